"""The command `pulid web`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openpulid.cli.options import Base, Device, Faces
from openpulid.errors import OptionError
from openpulid.web.page import open_app


def web(
    preset: Annotated[
        str, typer.Option(help="Chosen at first, see `pulid presets list`.")
    ] = "mini",
    base: Base = None,
    memory: Annotated[str | None, typer.Option(help="FLUX: full, 24gb, 16gb or 12gb.")] = None,
    faces: Faces = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Another file of PuLID, such as one of your training.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets everybody in who reaches this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where it listens.")] = 7860,
    device: Device = None,
) -> None:
    """The studio in the browser, every preset and method whose files are on this machine.

    What is said of base, memory, faces and adapter is for the preset chosen at first.
    """
    with open_app(preset, device, base=base, memory=memory, faces=faces, adapter=adapter) as blocks:
        import gradio as gr

        theme = gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["monospace"]
        )  # none from another machine
        try:
            blocks.launch(
                server_name=host, server_port=port, share=False, theme=theme, max_file_size="50mb"
            )
        except OSError as error:
            raise OptionError(
                f"port {port} cannot be had ({error}); choose another with --port."
            ) from None
