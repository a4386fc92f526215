"""Errors next to the components that they are about."""

from __future__ import annotations

from typing import Any

import gradio as gr

from openpulid.web.components import Page, mark_name
from openpulid.web.messages import mark_html
from openpulid.web.places import PLACES

Problem = tuple[str, str | None]
"""The text of an error and its place, or None for an error without one."""


def marks(page: Page) -> list[Any]:
    """Return the components for errors in all places."""
    return [page.parts[mark_name(place)] for place in PLACES]


def mark_outputs(page: Page) -> list[Any]:
    """Return all components that `show_problem` changes."""
    panels = dict.fromkeys(name for names in page.panels.values() for name in names)
    return marks(page) + [page.parts[name] for name in panels]


def show_problem(page: Page, problem: Problem | None) -> dict[Any, Any]:
    """Return the updates that show an error in its place, and none in any other.

    Args:
        page: the components.
        problem: the error; None if there is none.
    """
    text, place = problem or ("", None)
    updates: dict[Any, Any] = dict.fromkeys(marks(page), "")
    if place is not None:
        updates[page.parts[mark_name(place)]] = mark_html(text)
        updates |= {page.parts[name]: gr.Accordion(open=True) for name in page.panels[place]}
    return updates
