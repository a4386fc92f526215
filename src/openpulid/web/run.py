"""Generate on the page: progress, previews, each image as soon as it is finished."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import gradio as gr

from openpulid.web.components import Page
from openpulid.web.jobs import iterate_reports
from openpulid.web.messages import UNEXPECTED, describe_images, error_html, status_html
from openpulid.web.results import finish, show_images
from openpulid.web.session import WebSession
from openpulid.web.submit import PageError, submit
from openpulid.web.updates import Note, PageImage, Step


def run_generation(
    session: WebSession, page: Page, values: Mapping[str, Any], progress: Any
) -> Iterator[dict[Any, Any]]:
    """Run a generation, and yield updates of the page.

    Args:
        session: the backend.
        page: the components.
        values: of the form, with the names `job` and `visitor`.
        progress: Gradio's.
    """
    parts = page.parts
    job = values.get("job") or secrets.token_hex(8)
    session.begin(job)
    images: list[PageImage] = []
    notes: list[str] = []
    begin = time.monotonic()
    progress(0, desc="Preparing")
    reports = iterate_reports(partial(submit, session, values, job))
    try:
        for update in reports:
            if isinstance(update, Step):
                progress((update.done, update.total), desc=_describe_step(update, len(images)))
                if update.preview is not None:
                    yield {parts["live"]: gr.Image(value=update.preview, visible=True)}
            elif isinstance(update, Note):
                notes.append(update.text)
            elif isinstance(update, PageImage):
                images.append(update)
                session.history.add(values.get("visitor"), update)
                yield show_images(page, images)
            else:
                is_stopped = session.is_stopped(job)
                images = update.images
                text = describe_images(images, is_stopped, time.monotonic() - begin)
                message = status_html(text, notes)
                updates = finish(page, images)
                yield {**updates, parts["message"]: message, parts["problem"]: None}
    except PageError as error:
        updates = finish(page, images)
        updates[parts["message"]] = error_html(str(error), notes)
        yield {**updates, parts["problem"]: (str(error), error.place)}
    except Exception:
        updates = finish(page, images)
        yield {**updates, parts["message"]: error_html(UNEXPECTED), parts["problem"]: None}
        raise
    finally:  # also if the visitor has left
        session.stop(job)
        reports.close()


def _describe_step(step: Step, num_finished: int) -> str:
    return f"Image {num_finished + 1}, step {step.done} of {step.total}"
