"""Connect the components of the page with what they do."""

from __future__ import annotations

import secrets
from typing import Any

import gradio as gr

from openpulid.web.components import Page
from openpulid.web.form_events import connect_form
from openpulid.web.generation_events import connect_generation
from openpulid.web.layout import build_layout
from openpulid.web.person_events import connect_people
from openpulid.web.results import connect_results
from openpulid.web.session import KEPT_SECONDS, WebSession

DELETE_CACHE = (600, KEPT_SECONDS)
"""Every 600 seconds, older uploads are deleted."""


def build_page(session: WebSession) -> Any:
    """Build the page.

    Returns:
        Gradio's Blocks.
    """
    with gr.Blocks(title="openpulid", analytics_enabled=False, delete_cache=DELETE_CACHE) as blocks:
        page = build_layout(session)
        connect(session, page)
        visitor = page.parts["visitor"]
        blocks.load(_know_visitor, visitor, visitor, api_visibility="private")
    return blocks


def _know_visitor(visitor: str | None) -> str:
    """Return the secret of a browser, which a new one gets."""
    return visitor or secrets.token_urlsafe()


def connect(session: WebSession, page: Page) -> None:
    """Connect all events of the page."""
    connect_form(session, page)
    connect_people(session, page)
    connect_generation(session, page)
    connect_results(page)
