"""The components of the people of an image."""

from __future__ import annotations

from typing import Any

import gradio as gr

from openpulid.pipelines.request_fields import DEFAULT_FACE_ORDER
from openpulid.web.components import Page
from openpulid.web.editor import region_canvas
from openpulid.web.places import person_place
from openpulid.web.regions import (
    PERSON_COLORS,
    PERSON_PREFIXES,
    REGION_CHOICES,
    SIDE_BY_SIDE,
    describe_group,
)

UPLOADS: dict[str, Any] = {
    "object_fit": "contain",
    "fit_columns": False,
    # the content decides what is an image, not the name: a photo may have none of the usual endings
    "file_types": ["file"],
    "interactive": True,
    "buttons": [],
    "elem_classes": "references",
}

ORDER_CHOICES = [
    ("the largest", DEFAULT_FACE_ORDER),
    ("the smallest", "small-large"),
    ("the left", "left-right"),
    ("the right", "right-left"),
    ("the top", "top-bottom"),
    ("the bottom", "bottom-top"),
]
"""Label and value of where the counting of faces starts."""


def add_person(page: Page, prefix: str = "") -> None:
    """Add the images or the identity file of one person.

    Args:
        page: receives the components.
        prefix: of their names; "" for the only person.
    """
    label = "Reference images of one person" if not prefix else "Reference images"
    height = 140 if prefix else 180
    values, parts = page.values, page.parts
    small: Any = {"size": "sm", "min_width": 60}
    place = person_place(prefix)
    panel = f"{place}_panel"
    values[prefix + "reference_images"] = gr.Gallery(
        label=label, height=height, columns=2 if prefix else 4, **UPLOADS
    )
    with gr.Row(elem_classes="actions"):
        parts[prefix + "invent"] = gr.Button(
            "Invent" if prefix else "Invent a person",
            visible=page.preset.models.is_miniature,
            **small,
        )
        parts[prefix + "preview"] = gr.Button("Faces" if prefix else "Preview faces", **small)
        parts[prefix + "save"] = gr.Button("Save" if prefix else "Save identity", **small)
    parts[prefix + "download"] = gr.DownloadButton("Download", visible=False, size="sm")
    page.add_mark(place, *([panel] if prefix else []))
    with gr.Accordion("Identity file, or which face", open=False):
        values[prefix + "identity_file"] = gr.File(
            label="Identity file (.safetensors)", file_types=[".safetensors"], height=140
        )
        with gr.Row():
            values[prefix + "face_index"] = gr.Number(
                0, label="Face in images with several, from 0", precision=0, min_width=160
            )
            values[prefix + "face_order"] = gr.Dropdown(
                ORDER_CHOICES, value=DEFAULT_FACE_ORDER, label="Face 0 is", min_width=160
            )


def add_group(page: Page) -> None:
    """Add the people of an image with several, and the drawing of their regions."""
    page.parts["group"] = gr.Markdown(describe_group(page.preset.models))
    for pair in (PERSON_PREFIXES[:2], PERSON_PREFIXES[2:]):
        with gr.Row():
            for prefix in pair:
                with gr.Column(min_width=240):
                    _add_card(page, prefix)
    with gr.Accordion("Draw the regions", open=False) as page.parts["drawing"]:
        _add_drawing(page)


def _add_card(page: Page, prefix: str) -> None:
    number = PERSON_PREFIXES.index(prefix)
    title = f"Person {number + 1} ({PERSON_COLORS[number]})"
    panel = f"{person_place(prefix)}_panel"
    with gr.Accordion(title if number < 2 else f"{title}, optional", open=number < 2) as page.parts[
        panel
    ]:
        add_person(page, prefix)
        page.values[prefix + "region"] = gr.Dropdown(
            REGION_CHOICES,
            value=SIDE_BY_SIDE,
            label="Region",
            info="Or a box: left, top, right, bottom, such as 0,0,0.5,1.",
            allow_custom_value=True,
        )
        page.values[prefix + "mask"] = gr.File(
            label="Mask (white: the person)", height=140, visible=False, elem_classes="mask-file"
        )
        page.values[prefix + "scale"] = gr.Textbox(
            "", label="Scale", placeholder="as for all", max_lines=1
        )


def _add_drawing(page: Page) -> None:
    colors = ", ".join(f"person {k} in {color}" for k, color in enumerate(PERSON_COLORS, 1))
    gr.Markdown(f"Choose the brush and paint {colors}. Leave gaps between people.")
    page.values["regions"] = region_canvas()
    page.add_mark("drawing", "drawing")
    with gr.Row(elem_classes="actions"):
        page.parts["show_image"] = gr.Button(
            "Draw on the image to edit", size="sm", elem_id="show-image"
        )
        page.parts["save_regions"] = gr.Button("Download the regions", size="sm")
    page.parts["region_files"] = gr.File(
        label="Mask of each drawn person",
        file_count="multiple",
        visible=False,
        interactive=False,
        elem_id="regions",
    )
