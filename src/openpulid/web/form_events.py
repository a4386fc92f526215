"""Connect the form: tabs, prompts, settings, the history, and the lines about files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from openpulid.web import prompts
from openpulid.web.components import RESULTS, Page, remove_results
from openpulid.web.drawing import fit_canvas
from openpulid.web.file_lines import add_lines
from openpulid.web.handlers import PRIVATE
from openpulid.web.session import WebSession
from openpulid.web.settings import restore_settings, select_method, select_preset
from openpulid.web.updates import PageImage

SELECT_TAB = """() => {{
  document.body.dataset.tab = "{name}";
  return "{mode}";
}}"""
"""The stylesheet shows what belongs to a tab."""

INSERT = """(index, prompt) => {{
  const phrases = {phrases};
  const parts = prompt.split(",").map((part) => part.trim()).filter(Boolean);
  const others = parts.filter((part) => !phrases.includes(part));
  const isUsed = parts.includes(phrases[index]);
  return (isUsed ? others : [...others, phrases[index]]).join(", ");
}}"""
"""Put a phrase into the prompt in place of others on its topic, or take it out again."""


def connect_form(session: WebSession, page: Page) -> None:
    """Connect the form, but for the people in it."""
    _connect_tabs(page)
    _connect_prompts(page)
    _connect_settings(session, page)
    _connect_lines(page)


def _connect_tabs(page: Page) -> None:
    mode = page.values["mode"]
    for name in ("create", "edit", "people", "history", "about"):
        if name in page.parts:
            # what is generated does not change while somebody reads
            shown = "create" if name in ("history", "about") else name
            page.parts[name].select(None, None, mode, js=SELECT_TAB.format(name=name, mode=shown))
    size, regions = page.values["size"], page.values["regions"]
    size.change(fit_canvas, size, regions, **PRIVATE)


def _connect_prompts(page: Page) -> None:
    prompt = page.values["prompt"]
    for topic, phrases in prompts.list_topics().items():
        chips = page.parts[f"words_{topic}"]
        code = INSERT.format(phrases=json.dumps(phrases))
        chips.click(None, [chips, prompt], prompt, js=code)
    for name, examples in (
        ("mini_examples", prompts.MINI_EXAMPLES),
        ("photo_examples", prompts.PHOTO_EXAMPLES),
    ):
        chips = page.parts[name]
        chips.click(None, chips, prompt, js=f"(index) => {json.dumps(examples)}[index]")


def _connect_settings(session: WebSession, page: Page) -> None:
    values, parts = page.values, page.parts
    everything = [*values.values(), *parts.values()]
    values["preset"].input(
        partial(select_preset, session, page), values["preset"], everything, **PRIVATE
    )
    values["method"].input(
        partial(select_method, session, page),
        [values["preset"], values["method"]],
        everything,
        **PRIVATE,
    )
    restore = partial(restore_settings, session, page)
    parts["restore"].upload(restore, parts["restore"], everything, **PRIVATE)
    if "history" in parts:
        _connect_history(session, page, restore)


def _connect_history(
    session: WebSession, page: Page, restore: Callable[[str], dict[Any, Any]]
) -> None:
    parts = page.parts
    # images can be added while the visitor looks at earlier ones
    visitor, past, shown = parts["visitor"], parts["past"], parts["past_images"]

    def show(key: str | None) -> tuple[list[tuple[str, str]], list[PageImage]]:
        images = session.history.images(key)
        return [(image.file, image.caption) for image in images], images

    def select(images: list[PageImage], event: gr.SelectData) -> dict[Any, Any]:
        return restore(images[event.index].file)

    def clear(key: str | None) -> dict[Any, Any]:
        session.history.clear(key)
        return {past: [], shown: [], **remove_results(page)}

    parts["history"].select(show, visitor, [past, shown], **PRIVATE)
    past.select(select, shown, [*page.values.values(), *parts.values()], **PRIVATE)
    results = [parts[name] for name in RESULTS]
    parts["clear"].click(clear, visitor, [past, shown, *results], **PRIVATE)


def _connect_lines(page: Page) -> None:
    """Add a line for each uploaded LoRA and embedding, to change its scale or its word."""
    values = page.values
    for files, lines, value in (
        ("loras", "lora_lines", "1"),
        ("embeddings", "embedding_lines", "{}"),
    ):
        add = partial(add_lines, value=value)
        values[files].upload(add, [values[lines], values[files]], values[lines], **PRIVATE)
