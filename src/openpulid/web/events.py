"""Connect the components of the page with what they do."""

from __future__ import annotations

import inspect
import json
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr

from openpulid.web import prompts
from openpulid.web.invent import invent_person
from openpulid.web.layout import Page, build_layout, fit_canvas
from openpulid.web.people import preview_faces, save_identity
from openpulid.web.results import connect_results
from openpulid.web.run import run_generation
from openpulid.web.session import WebSession
from openpulid.web.settings import restore_settings, select_method, select_preset

DELETE_CACHE = (600, 3600)
"""Every 600 seconds, uploads older than 3600 seconds are deleted."""

# one studio, one request at a time
STUDIO: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "studio"}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
API_NAMES = {"preview": "faces", "save": "identity"}

SELECT_TAB = """() => {{
  document.body.dataset.tab = "{name}";
  return "{mode}";
}}"""
"""The stylesheet shows what belongs to a tab."""

BEGIN = """() => {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const job = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return [job, {__type__: "update", interactive: false}, {__type__: "update", visible: true}];
}"""

END = """() => {
  if (window.innerWidth < 768 && document.querySelector("#message .status"))
    document.querySelector("#images")?.scrollIntoView({behavior: "smooth"});
  return [{__type__: "update", interactive: true}, {__type__: "update", visible: false}];
}"""

INSERT = """(index, prompt) => {{
  const phrases = {phrases};
  const parts = prompt.split(",").map((part) => part.trim()).filter(Boolean);
  const others = parts.filter((part) => !phrases.includes(part));
  const isUsed = parts.includes(phrases[index]);
  return (isUsed ? others : [...others, phrases[index]]).join(", ");
}}"""
"""Put a phrase into the prompt in place of others on its topic, or take it out again."""

OPEN_DRAWING = """(region) =>
  region.startsWith("drawn") ? {__type__: "update", open: true} : {__type__: "update"}"""


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
    _connect_tabs(session, page)
    _connect_prompts(page)
    _connect_settings(session, page)
    for prefix in page.prefixes:
        _connect_person(session, page, prefix)
        if prefix:
            page.values[prefix + "region"].input(
                None,
                page.values[prefix + "region"],
                page.parts["drawing"],
                js=OPEN_DRAWING,
            )
    _connect_generation(session, page)
    connect_results(page)


def named_handler(
    function: Callable[[dict[str, Any]], Any], names: Sequence[str], *, progress: bool = False
) -> Callable[..., Any]:
    """Wrap a function of named values for Gradio, which passes values in order.

    Args:
        function: receives name -> value, and Gradio's progress if wanted.
        names: of the components, and so of the parameters in the page's API.
        progress: whether the function shows progress.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    if progress:
        parameters.append(inspect.Parameter("progress", kind, default=gr.Progress()))

    def handle(*values: Any) -> Any:
        named = dict(zip(names, values, strict=False))
        yield from function(named, *values[len(names) :])

    def handle_once(*values: Any) -> Any:
        return function(dict(zip(names, values, strict=True)))

    chosen = handle if progress else handle_once
    chosen.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return chosen


def _connect_tabs(session: WebSession, page: Page) -> None:
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
    visitor, past = parts["visitor"], parts["past"]

    def show(key: str | None) -> list[tuple[str, str]]:
        return [(image.file, image.caption) for image in session.history.images(key)]

    def select(key: str | None, event: gr.SelectData) -> dict[Any, Any]:
        return restore(session.history.images(key)[event.index].file)

    def clear(key: str | None) -> list[tuple[str, str]]:
        session.history.clear(key)
        return []

    parts["history"].select(show, visitor, past, **PRIVATE)
    past.select(select, visitor, [*page.values.values(), *parts.values()], **PRIVATE)
    parts["clear"].click(clear, visitor, past, **PRIVATE)


def _connect_person(session: WebSession, page: Page, prefix: str) -> None:
    values, parts = page.values, page.parts
    parts[prefix + "invent"].click(
        partial(invent_person, session.directory),
        None,
        values[prefix + "reference_images"],
        **({"api_name": "person"} if not prefix else PRIVATE),
    )
    names = [prefix + name for name in ("reference_images", "identity_file", "face_index")]
    names += ["preset", "method"]
    inputs = [values[name] for name in names]
    for name, function, output in (
        ("preview", preview_faces, "faces"),
        ("save", save_identity, prefix + "download"),
    ):
        parts[prefix + name].click(
            named_handler(partial(function, session, page, prefix), names),
            inputs,
            [parts[output], parts["message"]],
            show_progress_on=parts["message"],
            **STUDIO,
            **({"api_name": API_NAMES[name]} if not prefix else PRIVATE),
        )


def _connect_generation(session: WebSession, page: Page) -> None:
    parts = page.parts
    names = ["job", "visitor", *page.values]
    inputs = [parts["job"], parts["visitor"], *page.values.values()]
    outputs = [
        parts[name]
        for name in (
            "gallery", "message", "images", "selected", "live", "welcome", "actions", "compare",
            "download_all",
        )
    ]  # fmt: skip
    buttons = [parts["generate"], parts["stop"]]
    invented = parts["start"].click(
        partial(invent_person, session.directory),
        None,
        page.values["reference_images"],
        **PRIVATE,
    )
    handler = named_handler(partial(run_generation, session, page), names, progress=True)
    for event, api in (
        (parts["generate"].click, {"api_name": "generate"}),
        (page.values["prompt"].submit, PRIVATE),
        (invented.then, PRIVATE),
    ):
        begun = event(None, None, [parts["job"], *buttons], js=BEGIN)
        run = begun.then(
            handler, inputs, outputs, show_progress_on=parts["message"], **STUDIO, **api
        )
        run.then(None, None, buttons, js=END)
    parts["stop"].click(session.stop, parts["job"], None, queue=False, **PRIVATE)
