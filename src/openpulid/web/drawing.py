"""The canvas on which the regions of several people are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from openpulid.errors import PulidError
from openpulid.web.components import Page
from openpulid.web.marks import show_problem
from openpulid.web.messages import describe_error, error_html, status_html
from openpulid.web.regions import PERSON_COLORS, save_drawing
from openpulid.web.session import WebSession
from openpulid.web.sizes import canvas_size

NOT_DRAWN = f"no region is drawn; choose the brush and paint one, such as in {PERSON_COLORS[0]}."


def fit_canvas(size: str | None) -> Any:
    """Return the update of the canvas that gives it the ratio of a size."""
    return gr.ImageEditor(canvas_size=canvas_size(size))


def show_edited_image(image: Mapping[str, Any] | None) -> Any:
    """Return the update of the canvas that shows the image to edit, to draw on it.

    Args:
        image: the value of the editor with that image.
    """
    background = (image or {}).get("background")
    return {"background": background, "layers": [], "composite": None}


def save_regions(
    session: WebSession, page: Page, canvas: Mapping[str, Any] | None
) -> dict[Any, Any]:
    """Offer the drawn regions as mask files, one for each person."""
    message, files = page.parts["message"], page.parts["region_files"]
    try:
        drawn = save_drawing(canvas, session.make_folder())
    except PulidError as error:
        return _refuse(page, describe_error(error))
    masks = [mask for mask in drawn if mask is not None]
    if not masks:
        return _refuse(page, NOT_DRAWN)
    text = "Each file is the mask of a person, also for `pulid generate --mask`."
    return {
        **show_problem(page, None),
        files: gr.File(value=masks, visible=True),
        message: status_html(text),
    }


def _refuse(page: Page, text: str) -> dict[Any, Any]:
    hidden = gr.File(value=None, visible=False)
    return {
        **show_problem(page, (text, "drawing")),
        page.parts["region_files"]: hidden,
        page.parts["message"]: error_html(text),
    }
