"""The buttons of one person: invent, preview the faces, save the identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from openpulid.errors import PulidError
from openpulid.web.components import Page
from openpulid.web.form import FormValues
from openpulid.web.inputs import draw_faces, identify
from openpulid.web.messages import (
    describe_error,
    describe_note,
    error_html,
    explain_errors,
    status_html,
)
from openpulid.web.notes import show_notes
from openpulid.web.places import person_place
from openpulid.web.session import WebSession

Updates = dict[Any, Any]


def preview_faces(
    session: WebSession, page: Page, prefix: str, values: Mapping[str, Any]
) -> Updates:
    """Show the faces that are detected in the reference images of a person."""

    def preview(form: FormValues) -> tuple[Updates, str]:
        person = form.reference(prefix)
        models = session.select_models(form.preset, form.method)
        image = draw_faces(session, person, models)
        return {page.parts["faces"]: gr.Image(value=image, visible=True)}, "Faces detected."

    return _use_person(page, prefix, values, preview)


def save_identity(
    session: WebSession, page: Page, prefix: str, values: Mapping[str, Any]
) -> Updates:
    """Offer the identity of a person as a file."""

    def save(form: FormValues) -> tuple[Updates, str]:
        person = form.reference(prefix)
        models = session.select_models(form.preset, form.method)
        identity = identify(session, person, models)
        name = Path(person.images[0]).stem
        file = session.make_folder() / f"{name}.safetensors"
        identity.save(file)
        button = gr.DownloadButton(label=f"Download {file.name}", value=str(file), visible=True)
        text = "The identity can be used in place of the images; keep it like a photo."
        return {page.parts[prefix + "download"]: button}, text

    return _use_person(page, prefix, values, save)


def _use_person(
    page: Page,
    prefix: str,
    values: Mapping[str, Any],
    use: Callable[[FormValues], tuple[Updates, str]],
) -> Updates:
    """Do something with the reference images of a person; errors become sentences."""
    form = FormValues(values)
    message, problem = page.parts["message"], page.parts["problem"]
    notes: list[str] = []
    try:
        with (
            show_notes(lambda note: notes.append(describe_note(note, form.files()))),
            explain_errors(),
        ):
            updates, text = use(form)
        return {**updates, message: status_html(text, notes), problem: None}
    except PulidError as error:
        text = describe_error(error, form.files())
        place = person_place(prefix)
        return {message: error_html(text, notes), problem: (text, place)}
