"""The components of what is added to the base model."""

from __future__ import annotations

from typing import Any

import gradio as gr

from openpulid.web.add_ons import (
    CONTROL_PREFIXES,
    CONTROL_SCALES,
    KIND_CHOICES,
    MAP_CHOICES,
    STYLE_SCALES,
    control_choices,
    has_controls,
    has_loras,
    style_choices,
)
from openpulid.web.components import Page
from openpulid.web.places import control_place

ORDINALS = ("ControlNet", "Second ControlNet", "Third ControlNet", "Fourth ControlNet")


def add_add_ons(page: Page) -> None:
    """Add ControlNets, the style image, LoRAs and textual inversion."""
    parts, preset = page.parts, page.preset
    with gr.Accordion("ControlNet", open=False, visible=has_controls(preset)) as parts["nets"]:
        for prefix, name in zip(CONTROL_PREFIXES, ORDINALS, strict=True):
            if not prefix:
                _add_control(page, prefix, name)
                continue
            panel = f"{control_place(prefix)}_panel"
            with gr.Accordion(name, open=False) as parts[panel]:
                _add_control(page, prefix, name)
    styles = style_choices(preset)
    with gr.Accordion("Style of another image", open=False, visible=bool(styles)) as parts["style"]:
        _add_style(page, styles)
    with gr.Accordion("LoRA and textual inversion", open=False, visible=has_loras(preset)) as parts[
        "loras"
    ]:
        _add_loras(page)


def _add_control(page: Page, prefix: str, name: str) -> None:
    values = page.values
    place = control_place(prefix)
    page.add_mark(place, "nets", *([f"{place}_panel"] if prefix else []))
    values[prefix + "control"] = gr.Dropdown(
        control_choices(page.preset),
        value="",
        label=name,
        info="Or OWNER/NAME on the hub, or the absolute path of a folder.",
        allow_custom_value=True,
    )
    # not gr.Image, which decodes the file: it drops alpha and profile, and fails on HEIC
    values[prefix + "control_image"] = gr.File(label=f"Image of the {name}", height=140)
    with gr.Row():
        values[prefix + "control_map"] = gr.Dropdown(
            MAP_CHOICES, value="", label="This image is", min_width=200
        )
        values[prefix + "control_kind"] = gr.Dropdown(
            KIND_CHOICES, value="", label="The ControlNet follows", min_width=200
        )
    values[prefix + "control_scale"] = gr.Slider(
        *CONTROL_SCALES, value=1.0, step=0.05, label=f"{name} scale"
    )
    with gr.Row():
        for end, value in (("start", 0.0), ("end", 1.0)):
            values[f"{prefix}control_{end}"] = gr.Slider(
                0, 1, value=value, step=0.05, label=f"{end.capitalize()} (fraction of steps)"
            )


def _add_style(page: Page, styles: list[tuple[str, str]]) -> None:
    page.add_mark("style", "style")
    page.values["style_image"] = gr.File(label="Style image", height=140)
    page.values["style_scale"] = gr.Slider(*STYLE_SCALES, value=0.5, step=0.05, label="Style scale")
    page.values["style_model"] = gr.Dropdown(
        styles, value=styles[0][1] if styles else None, label="IP-Adapter", allow_custom_value=True
    )


def _add_loras(page: Page) -> None:
    files: Any = {"file_count": "multiple", "file_types": [".safetensors"], "height": 140}
    lines: Any = {"lines": 2, "max_lines": 8}
    values = page.values
    page.add_mark("loras", "loras")
    values["loras"] = gr.File(label="LoRA files (.safetensors)", **files)
    values["lora_lines"] = gr.Textbox(
        label="LoRAs and their scales",
        info="One per line: one of these files, or OWNER/NAME on the hub, then :SCALE.",
        placeholder="film.safetensors:0.8",
        **lines,
    )
    values["embeddings"] = gr.File(label="Files of textual inversion (.safetensors)", **files)
    values["embedding_lines"] = gr.Textbox(
        label="Words of textual inversion",
        info="One per line: a file, then : and the word for it in the prompt.",
        placeholder="film-noir.safetensors:film-noir",
        **lines,
    )
