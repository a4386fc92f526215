"""Generate what the form describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openpulid.errors import PulidError
from openpulid.web.form import FormValues
from openpulid.web.generation import generate_images
from openpulid.web.messages import describe_error, describe_note, explain_errors
from openpulid.web.notes import show_notes
from openpulid.web.places import find_place
from openpulid.web.session import WebSession
from openpulid.web.updates import Finished, Note, Update


class PageError(PulidError):
    """An error in the terms of the page.

    Attributes:
        place: where on the page it belongs; None for no place of its own.
    """

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(message)
        self.place = place


def submit(
    session: WebSession,
    values: Mapping[str, Any],
    job: str,
    report: Callable[[Update], None],
) -> None:
    """Generate what the form describes, and report everything.

    Args:
        session: the backend.
        values: of the form.
        job: name of this call for `WebSession.stop`.
        report: receives steps, notes and images.

    Raises:
        PageError: the request cannot be run.
    """
    form = FormValues(values)
    request = None
    try:
        with (
            show_notes(lambda note: report(Note(describe_note(note, form.files())))),
            explain_errors(),
            TemporaryDirectory(dir=session.directory) as masks,
        ):
            preset = session.preset(session.select_models(form.preset, form.method))
            request = form.to_request(preset, Path(masks), session.allow_paths)
            also_without_identity = bool(values.get("also_without_identity"))
            report(Finished(generate_images(session, request, also_without_identity, report, job)))
    except PulidError as error:
        place = find_place(error, form, request)
        raise PageError(describe_error(error, form.files()), place) from None
