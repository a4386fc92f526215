"""Connect the buttons that begin and stop a generation."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from openpulid.web.components import Page
from openpulid.web.handlers import PRIVATE, STUDIO, named_handler
from openpulid.web.invent import invent_person
from openpulid.web.marks import mark_outputs, marks, show_problem
from openpulid.web.messages import describe_images, status_html
from openpulid.web.run import run_generation
from openpulid.web.session import WebSession

BEGIN = """() => {{
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const job = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  const pause = {{__type__: "update", interactive: false}};
  const stop = {{__type__: "update", visible: true}};
  return [job, pause, pause, stop, ...Array({num_marks}).fill("")];
}}"""
"""Name the job, disable what would begin another one, show the button Stop, and remove the errors
of the last one."""

PRESS = "() => document.querySelector('#generate').click()"
"""Press Generate, which does nothing while a generation runs: Stop ends a single one."""

END = """() => {
  const mark = document.querySelector(".mark .error");
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const behavior = still ? "instant" : "smooth";
  if (mark)
    setTimeout(() => mark.scrollIntoView({behavior, block: "center"}), 100);
  else if (window.innerWidth < 768 && document.querySelector("#message .status"))
    document.querySelector("#images")?.scrollIntoView({behavior});
  const resume = {__type__: "update", interactive: true};
  return [resume, resume, {__type__: "update", visible: false}];
}"""
"""Show the error, or on a telephone the images; without motion for those who ask for none."""

OUTPUTS = (
    *("gallery", "message", "images", "selected", "live", "welcome", "actions", "compare"),
    *("problem", "download_all"),
)
"""Names of the components that a generation changes."""


def connect_generation(session: WebSession, page: Page) -> None:
    """Connect the buttons that begin and stop a generation."""
    parts = page.parts
    names = ["job", "visitor", *page.values]
    inputs = [parts["job"], parts["visitor"], *page.values.values()]
    buttons = [parts["generate"], parts["start"], parts["stop"]]
    values = page.values

    def start() -> dict[Any, Any]:
        return {
            values["reference_images"]: invent_person(session.directory),
            # the button is also shown next to the other tabs, which do not use this person
            values["mode"]: "create",
            parts["tabs"]: gr.Tabs(selected="create"),
        }

    invented = parts["start"].click(
        start, None, [values["reference_images"], values["mode"], parts["tabs"]], **PRIVATE
    )
    handler = named_handler(partial(run_generation, session, page), names, progress=True)
    begin = BEGIN.format(num_marks=len(marks(page)))
    begun = parts["generate"].click(None, None, [parts["job"], *buttons, *marks(page)], js=begin)
    run = begun.then(
        handler,
        inputs,
        [parts[name] for name in OUTPUTS],
        show_progress_on=parts["message"],
        api_name="generate",
        **STUDIO,
    )
    run.then(partial(show_problem, page), parts["problem"], mark_outputs(page), **PRIVATE).then(
        None, None, buttons, js=END
    )
    for event in (page.values["prompt"].submit, invented.then):
        event(None, None, None, js=PRESS)

    parts["stop"].click(
        partial(stop_generation, session), parts["job"], parts["cancelled"], queue=False, **PRIVATE
    )
    cancelled = parts["cancelled"].change(None, None, None, cancels=[run])
    status = status_html(describe_images([], is_stopped=True, seconds=0))
    cancelled.then(lambda: status, None, parts["message"], **PRIVATE)
    cancelled.then(None, None, buttons, js=END)


def stop_generation(session: WebSession, job: str) -> Any:
    """Stop a generation; return its name if it still waits, so that it leaves the queue."""
    has_begun = session.has_begun(job)
    session.stop(job)
    return gr.skip() if has_begun else job
