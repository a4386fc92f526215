"""The page without a browser: its form, its session, and what it shows."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import gradio
from PIL import Image

from openpulid.pipelines.request import GenerationRequest
from openpulid.web.events import connect
from openpulid.web.form import FormValues
from openpulid.web.generation import generate_images
from openpulid.web.layout import build_layout
from openpulid.web.masks import COLOR_NAMES, COLORS, PAINT
from openpulid.web.run import run_generation
from openpulid.web.session import WebSession
from openpulid.web.updates import PageImage

SETTINGS: dict[str, Any] = {
    "prompt": "portrait, photo, smiling",
    "preset": "mini-lightning",
    "method": "pulid",
    "scale": 1.0,
    "num_images": 1,
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "seed": "3",
}


def build_request(session: WebSession, directory: Path, **values: Any) -> GenerationRequest:
    """Build the request of a form."""
    form = FormValues({**SETTINGS, **values})
    preset = session.preset(session.select_models(form.preset, form.method))
    return form.to_request(preset, directory, session.allow_paths)


def generate(session: WebSession, **values: Any) -> list[PageImage]:
    """Send the form to a session, as the page does."""
    request = build_request(session, session.directory, **values)
    return generate_images(session, request, bool(values.get("also_without_identity")))


def run_page(session: WebSession, **values: Any) -> list[dict[str, Any]]:
    """Run the generation of a page, and return its updates by the names of components."""
    with gradio.Blocks():
        page = build_layout(session)
    names = {component: name for name, component in page.parts.items()}
    updates = run_generation(session, page, {**SETTINGS, **values}, lambda *_, **__: None)
    return [{names[part]: value for part, value in update.items()} for update in updates]


def click(session: WebSession, button: str, *values: Any) -> dict[str, Any]:
    """Call what a button of the page calls first; return its updates by names of components."""
    with gradio.Blocks() as blocks:
        page = build_layout(session)
        connect(session, page)
    names = {component: name for name, component in {**page.values, **page.parts}.items()}
    target = (page.parts[button]._id, "click")
    event = next(event for event in blocks.fns.values() if target in event.targets)
    assert event.fn is not None
    updates = event.fn(*values)
    assert updates.keys() <= set(event.outputs)
    return {names[component]: value for component, value in updates.items()}


def message_of(updates: list[dict[str, Any]]) -> str:
    return str(updates[-1]["message"])


def pixels(image: PageImage | str) -> bytes:
    return Image.open(image.file if isinstance(image, PageImage) else image).tobytes()


def draw(path: Path, **areas: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return the value of an editor with areas in the colors of people, or of paint."""
    layer = Image.new("RGBA", (100, 100))
    for color, box in areas.items():
        shade = PAINT if color == "paint" else COLORS[COLOR_NAMES.index(color)]
        layer.paste((*shade, 190 if color == "paint" else 255), box)
    layer.save(path)
    return {"background": None, "layers": [str(path)], "composite": None}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
