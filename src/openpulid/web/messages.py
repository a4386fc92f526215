"""Errors, notes and results as sentences on the page, next to the form."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from openpulid.errors import (
    PulidError,
    escape_unprintable,
    explain_missing_library,
    explain_out_of_memory,
)
from openpulid.pipelines.request_fields import RequestError
from openpulid.web.labels import FIELD_LABELS, adapt_message
from openpulid.web.updates import PageImage

OUT_OF_MEMORY_ADVICE = (
    "choose a smaller size, or start the page with a lower --memory or another --device"
)

FILE_FIRST = re.compile(r"[^:;,]*\.[A-Za-z]\w{1,11}[: ]")
"""A message that begins with the name of a file, which keeps its case."""

UNEXPECTED = "an unexpected error; the terminal of `pulid web` shows it."


def describe_error(error: PulidError, files: Iterable[str] = ()) -> str:
    """Return an error in the terms of the page.

    Args:
        error: of the user.
        files: the uploads of the form.
    """
    shown = error.rename(FIELD_LABELS) if isinstance(error, RequestError) else error
    return adapt_message(str(shown), files)


def describe_note(note: str, files: Iterable[str] = ()) -> str:
    """Return a warning in the terms of the page, see `describe_error`."""
    return adapt_message(escape_unprintable(note), files)


@contextmanager
def explain_errors() -> Iterator[None]:
    """Turn errors of libraries that the user can fix into sentences."""
    with explain_out_of_memory(OUT_OF_MEMORY_ADVICE), explain_missing_library():
        yield


def error_html(text: str, notes: Sequence[str] = ()) -> str:
    """Return an error for the page; a screen reader reads it at once."""
    return f'<div class="error" role="alert">{_sentence(text)}</div>' + _notes_html(notes)


def mark_html(text: str) -> str:
    """Return an error for its place in the form; the message next to the button is read aloud."""
    return f'<div class="error">{_sentence(text)}</div>'


def status_html(text: str, notes: Sequence[str] = ()) -> str:
    """Return a status for the page."""
    return f'<div class="status" role="status">{_sentence(text)}</div>' + _notes_html(notes)


def describe_images(images: Sequence[PageImage], is_stopped: bool, seconds: float) -> str:
    """Describe what a generation has given."""
    if not images:
        return "Stopped before the first image was finished."
    count = f"{len(images)} image" + ("s" if len(images) > 1 else "")
    seeds = sorted({image.seed for image in images})
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    if is_stopped:
        return f"Stopped. {count} finished, {seed}."
    return f"{count} in {seconds:.1f} s, {seed}."


def _notes_html(notes: Sequence[str]) -> str:
    return "".join(f'<div class="note" role="status">{_sentence(note)}</div>' for note in notes)


def _sentence(text: str) -> str:
    if not FILE_FIRST.match(text):
        text = text[:1].upper() + text[1:]
    return html.escape(text if text.endswith((".", "!", "?")) else f"{text}.", quote=False)
