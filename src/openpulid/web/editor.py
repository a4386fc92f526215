"""Image editors that leave the decoding of what was uploaded to `io.images`."""

from __future__ import annotations

import secrets
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from openpulid.io.files import make_folder, write_bytes
from openpulid.web.masks import COLORS, PAINT, hex_color


def edit_canvas(brush_size: int) -> gr.ImageEditor:
    """Build the editor for an image, in which the part that is to change is painted.

    Args:
        brush_size: in pixels of the image.
    """
    color: Any = (hex_color(PAINT), 0.75)
    brush = gr.Brush(
        default_size=brush_size, colors=[color], default_color=color, color_mode="fixed"
    )
    return _build_editor(
        label="Image to edit", height=360, sources=("upload", "clipboard"), brush=brush
    )


def region_canvas() -> gr.ImageEditor:
    """Build the editor for the regions of several people, each in one color."""
    colors: list[Any] = [hex_color(color) for color in COLORS]
    brush = gr.Brush(default_size=60, colors=colors, default_color=colors[0], color_mode="fixed")
    return _build_editor(
        label="Drawn regions", height=320, sources=(), brush=brush, canvas_size=(512, 512)
    )


def _build_editor(**options: Any) -> gr.ImageEditor:
    """Build an editor whose value names files that have not been decoded.

    Gradio would decode them in the server's process, without limits of time and size.
    """
    editor = gr.ImageEditor(
        type="filepath",
        layers=gr.LayerOptions(allow_additional_layers=False, disabled=True),
        transforms=(),
        buttons=["fullscreen"],
        **options,
    )
    # not a subclass: Gradio writes a stub file next to the module of each
    vars(editor)["convert_and_format_image"] = partial(_keep_file, editor)
    return editor


def _keep_file(editor: gr.ImageEditor, file: Any, flatten_on_white: bool = False) -> Any:
    """Return the path of a part of the image; write one that is in memory."""
    if file is None:
        return None
    if not isinstance(file, (bytes, bytearray, memoryview)):
        return file.path
    folder = Path(editor.GRADIO_CACHE) / secrets.token_hex(16)
    make_folder(folder)
    path = str(write_bytes(folder / "image.png", bytes(file), private=True))
    editor.temp_files.add(path)  # Gradio deletes it after a while
    return path
