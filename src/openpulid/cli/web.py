"""The command `pulid web`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openpulid.cli.options import Base, Device, FacePack, Memory, name_options, print_status
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
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve.")] = 7860,
    device: Device = None,
) -> None:
    """Serve the web page, with every preset and method whose weights are installed.

    Base, memory, faces and adapter apply to the preset that is selected first.
    """
    from openpulid.web.network import check_address, without_proxy
    from openpulid.web.page import open_app
    from openpulid.web.server import launch_options

    check_address(host, port)
    changes = {"base": base, "memory": memory, "face_pack": faces, "adapter": adapter}
    options = {name: str(value) for name, value in changes.items() if value is not None}
    with without_proxy(), name_options(), open_app(preset, device, **options) as blocks:
        import gradio as gr

        # local fonts only
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        try:
            blocks.launch(
                server_port=port, theme=theme, prevent_thread_lock=True, **launch_options(host)
            )
        except OSError as error:
            raise OptionError(
                f"port {port} is not available ({error}); choose another with --port."
            ) from None
        print_status(f"the page is at {blocks.local_url}; stop it with Ctrl-C.")
        blocks.block_thread()
