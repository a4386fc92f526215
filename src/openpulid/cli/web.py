"""The command `pulid web`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openpulid.cli.options import Base, Device, FacePack, Memory, name_options, print_status
from openpulid.cli.signing import Certificate, Key, Sign, load_signer
from openpulid.errors import OptionError


def web(
    preset: Annotated[
        str, typer.Option(help="Preset that is selected first (`pulid presets list`).")
    ] = "mini",
    base: Base = None,
    memory: Memory = None,
    faces: FacePack = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Another adapter file of PuLID, such as one of your own.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve; 0.0.0.0 is open to the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve.")] = 7860,
    c2pa: Sign = False,
    c2pa_cert: Certificate = None,
    c2pa_key: Key = None,
    device: Device = None,
    history: Annotated[
        bool | None,
        typer.Option(
            help="Show each visitor what they have generated; by default only on 127.0.0.1."
        ),
    ] = None,
) -> None:
    """Serve the web page, with every preset and method whose weights are installed.

    Base, memory, faces and adapter apply to the preset that is selected first.
    """
    from openpulid.io.serving import check_address, is_loopback
    from openpulid.web.page import open_app
    from openpulid.web.server import launch_options

    check_address(host, port)
    changes = {"base": base, "memory": memory, "face_pack": faces, "adapter": adapter}
    options = {name: str(value) for name, value in changes.items() if value is not None}
    is_private = is_loopback(host)
    app = open_app(
        preset,
        device,
        has_history=is_private if history is None else history,
        allow_paths=is_private,
        signer=load_signer(c2pa, c2pa_cert, c2pa_key),
        **options,
    )
    with name_options(), app as blocks:
        try:
            blocks.launch(server_port=port, prevent_thread_lock=True, **launch_options(host))
        except OSError as error:
            raise OptionError(
                f"port {port} is not available ({error}); choose another with --port."
            ) from None
        print_status(f"the page is at {blocks.local_url}; stop it with Ctrl-C.")
        blocks.block_thread()
