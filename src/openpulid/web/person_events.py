"""Connect the components of each person, and the drawing of regions."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from openpulid.web.components import Page
from openpulid.web.drawing import save_regions, show_edited_image
from openpulid.web.handlers import PRIVATE, STUDIO, named_handler
from openpulid.web.invent import invent_person
from openpulid.web.marks import mark_outputs, show_problem
from openpulid.web.people import preview_faces, save_identity
from openpulid.web.regions import MASK_FILE
from openpulid.web.session import WebSession

API_NAMES = {"preview": "faces", "save": "identity"}

SHOW_REGION = f"""(region) => [
  (region || "").startsWith("drawn") ? {{__type__: "update", open: true}} : {{__type__: "update"}},
  {{__type__: "update", visible: region === "{MASK_FILE}"}},
]"""
"""Open the drawing, or show the component for a mask file, as the region of a person needs it."""

HIDE = '() => ({__type__: "update", visible: false})'
"""Hide the button for the identity file, which is that of another person now."""


def connect_people(session: WebSession, page: Page) -> None:
    """Connect the components of each person, and the drawing of regions."""
    for prefix in page.prefixes:
        _connect_person(session, page, prefix)
        if prefix:
            region, mask = page.values[prefix + "region"], page.values[prefix + "mask"]
            region.input(None, region, [page.parts["drawing"], mask], js=SHOW_REGION)
    _connect_drawing(session, page)


def _connect_person(session: WebSession, page: Page, prefix: str) -> None:
    values, parts = page.values, page.parts
    parts[prefix + "invent"].click(
        partial(invent_person, session.directory),
        None,
        values[prefix + "reference_images"],
        **({"api_name": "person"} if not prefix else PRIVATE),
    )
    own = ("reference_images", "identity_file", "face_index", "face_order")
    names = [*(prefix + name for name in own), "preset", "method"]
    inputs = [values[name] for name in names]
    for name, function, output in (
        ("preview", preview_faces, "faces"),
        ("save", save_identity, prefix + "download"),
    ):
        clicked = parts[prefix + name].click(
            named_handler(partial(function, session, page, prefix), names),
            inputs,
            [parts[output], parts["message"], parts["problem"]],
            show_progress_on=parts["message"],
            **STUDIO,
            **({"api_name": API_NAMES[name]} if not prefix else PRIVATE),
        )
        clicked.then(partial(show_problem, page), parts["problem"], mark_outputs(page), **PRIVATE)
    changes = [component.change for component in inputs]
    gr.on(changes, None, None, parts[prefix + "download"], js=HIDE, **PRIVATE)


def _connect_drawing(session: WebSession, page: Page) -> None:
    values, parts = page.values, page.parts
    parts["show_image"].click(show_edited_image, values["edit_image"], values["regions"], **PRIVATE)
    outputs: list[Any] = [parts["region_files"], parts["message"], *mark_outputs(page)]
    parts["save_regions"].click(
        partial(save_regions, session, page), values["regions"], outputs, **PRIVATE
    )
