"""Errors are shown next to the components that they are about."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openpulid.pipelines.presets import PRESETS
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import RequestError
from openpulid.web.form import FormValues
from openpulid.web.places import FIELD_PLACES, PLACES, find_place
from openpulid.web.session import WebSession

gradio = pytest.importorskip("gradio", reason="extra web is not installed", exc_type=ImportError)

from openpulid.web.layout import build_layout  # noqa: E402
from openpulid.web.marks import mark_outputs, show_problem  # noqa: E402
from openpulid.web.people import preview_faces  # noqa: E402
from openpulid.web.settings import restore_settings  # noqa: E402
from tests.web.page_support import SETTINGS, run_page  # noqa: E402


@pytest.fixture
def session(tmp_path: Path) -> WebSession:
    return WebSession(tmp_path)


@pytest.fixture
def empty_room(tmp_path: Path) -> str:
    """An image without a face."""
    file = tmp_path / "empty room.png"
    Image.new("RGB", (96, 96), "gray").save(file)
    return str(file)


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": "portrait, spaceship"}, "prompt"),
        ({"seed": "1e5"}, "main"),
        ({"num_images": 65}, "main"),
        ({"size": "large"}, "main"),
        ({"size": "97x96"}, "main"),
        ({"num_inference_steps": 0}, "more"),
        ({"guidance_scale": 1e9}, "more"),
        ({"mode": "edit"}, "edit"),
        ({"refine_faces": True, "refine_strength": 2.0}, "faces"),
        ({"reference_images": [("{room}", None)]}, "person"),
        ({"mode": "people", "person3_reference_images": [("{room}", None)]}, "person3"),
        ({"mode": "people", "person2_identity_file": "{room}"}, "person2"),
        ({"loras": ["{room}"]}, "loras"),
        ({"embeddings": ["{room}"]}, "loras"),
    ],
)
def test_error_is_shown_in_its_place(
    session: WebSession, empty_room: str, form: dict[str, Any], place: str
) -> None:
    def fill(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(fill, value))
        return empty_room if value == "{room}" else value

    (update,) = run_page(session, **{name: fill(value) for name, value in form.items()})
    text, shown = update["problem"]
    assert shown == place and str(Path(empty_room).parent) not in text
    assert text[1:] in html.unescape(update["message"])  # next to the button as well
    assert "gallery" not in update  # the old images stay


def test_every_place_is_on_the_page(session: WebSession) -> None:
    with gradio.Blocks():
        page = build_layout(session)
    assert set(page.panels) == set(PLACES) and len(PLACES) == len(set(PLACES))
    assert {"main", "prompt", "more", "edit", "faces"} == set(FIELD_PLACES.values())
    outputs = mark_outputs(page)
    for place in PLACES:
        updates = show_problem(page, ("bad <value>.", place))
        assert set(updates) <= set(outputs)
        shown = {part for part, value in updates.items() if isinstance(value, str) and value}
        assert shown == {page.parts[f"{place}_mark"]}
        (mark,) = shown
        assert updates[mark] == '<div class="error">Bad &lt;value&gt;.</div>'
        panels = [page.parts[name] for name in page.panels[place]]
        assert all(updates[panel].constructor_args == {"open": True} for panel in panels)
    assert set(show_problem(page, None).values()) == {""}
    assert set(show_problem(page, ("bad.", None)).values()) == {""}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_field_of_a_request_has_a_place(preset: str) -> None:
    form = FormValues({"preset": preset, "reference_images": [("anna.png", None)]})
    request = PRESETS[preset]().resolve(GenerationRequest("portrait"))
    fields = {"people.0.mask", "controls.0.image", "loras.0.scale", "embeddings.0.token"}
    fields |= {"init_image.mask", "style_image.model", "width", "model.method"}
    fields |= {*request.list_options(), "num_images", "seed", "prompt"}
    for field in fields:
        path = f"identity.{field}" if f"identity.{field}" in FIELD_PLACES else field
        assert find_place(RequestError("{0} is wrong.", path), form) in PLACES, path


def test_buttons_of_a_person_mark_the_person(session: WebSession, empty_room: str) -> None:
    with gradio.Blocks():
        page = build_layout(session)
    values = {**SETTINGS, "person2_reference_images": [(empty_room, None)]}
    updates = preview_faces(session, page, "person2_", values)
    text, place = updates[page.parts["problem"]]
    assert text.startswith("empty room.png: no face detected") and place == "person2"
    assert page.parts["faces"] not in updates  # the last ones stay


def test_image_without_settings_marks_the_drop_area(session: WebSession, empty_room: str) -> None:
    with gradio.Blocks():
        page = build_layout(session)
    updates = restore_settings(session, page, empty_room)
    mark = updates[page.parts["restore_mark"]]
    assert "empty room.png contains no generation parameters" in mark
    assert str(Path(empty_room).parent) not in mark
    assert updates[page.parts["restoring"]].constructor_args == {"open": True}
    assert page.values["prompt"] not in updates


def test_later_success_removes_the_error(session: WebSession) -> None:
    updates = run_page(session)
    assert updates[-1]["problem"] is None and "1 image in" in updates[-1]["message"]
