"""Several people on the page: their regions, their faces, and together with an image to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.io.images import open_mask
from openpulid.io.metadata import XMP_KEY, find_text
from openpulid.pipelines.presets import find_preset, mini
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.request_inputs import Person
from openpulid.web.masks import COLORS, split_colors
from openpulid.web.regions import DRAWN, MASK_FILE, PERSON_PREFIXES
from openpulid.web.restore import describe_files, read_values
from openpulid.web.session import WebSession
from openpulid.world.gallery import render_portrait
from tests.support.composer_files import TWO_PEOPLE, draw_person, link_miniature

gradio = pytest.importorskip("gradio", reason="extra web is not installed", exc_type=ImportError)

from openpulid.web.drawing import NOT_DRAWN, save_regions, show_edited_image  # noqa: E402
from openpulid.web.events import connect  # noqa: E402
from openpulid.web.layout import build_layout  # noqa: E402
from openpulid.web.people import preview_faces, save_identity  # noqa: E402
from openpulid.web.person_events import HIDE  # noqa: E402
from openpulid.web.settings import select_method  # noqa: E402
from tests.web.page_support import (  # noqa: E402
    SETTINGS,
    build_request,
    draw,
    generate,
    pixels,
    run_page,
)


def test_soft_edge_of_a_stroke_has_its_color(tmp_path: Path) -> None:
    """On white, half of red looks more like orange."""
    for number, color in enumerate(COLORS):
        disc = Image.new("RGBA", (400, 400), (*color, 0))
        disc.putalpha(Image.radial_gradient("L").resize((400, 400)).point(lambda x: 255 - x))
        disc.save(tmp_path / "layer.png")
        masks = split_colors({"layers": [str(tmp_path / "layer.png")]}, COLORS, tmp_path)
        assert [mask is not None for mask in masks] == [k == number for k in range(len(COLORS))]
        share = np.mean(open_mask(masks[number])) / 255
        assert share == pytest.approx(np.mean(np.array(disc)[..., 3] > 127.5), abs=0.01)


def test_scale_that_the_page_does_not_offer_is_not_restored(two: dict[str, Any]) -> None:
    person = Person(images=["anna.png"], scale=3)
    request = GenerationRequest("portrait", people=[person])
    with pytest.raises(OptionError, match="generated with Identity scale 3, which this page"):
        read_values(request, find_preset("mini"))


@pytest.fixture
def session(tmp_path: Path) -> WebSession:
    return WebSession(tmp_path)


@pytest.fixture
def two(anna: Path) -> dict[str, Any]:
    """The form with two people."""
    images = [(str(anna), None)]
    return {
        "mode": "people",
        "person1_reference_images": images,
        "person2_reference_images": images,
    }


def restore(request: GenerationRequest, **hashes: str) -> tuple[dict[str, Any], str]:
    """Return the values of the form for an image, and the sentence on its files."""
    preset = mini() if request.model is None else find_preset(request.model.preset)
    provenance = Provenance.create(preset.resolve(request.with_memory("full")), hashes)
    return read_values(provenance.request, preset), describe_files(provenance)


def test_regions_are_side_by_side_or_drawn(session: WebSession, tmp_path: Path, anna: Path) -> None:
    people = {f"person{k}_reference_images": [(str(anna), None)] for k in (1, 3)}
    people["person3_scale"] = " 0.5"
    request = build_request(session, tmp_path, mode="people", **people)
    assert [person.box for person in request.people] == [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert [person.scale for person in request.people] == [None, 0.5]
    regions = draw(tmp_path / "layer.png", red=(0, 0, 40, 100), green=(60, 0, 100, 100))
    drawn = {"person1_region": DRAWN, "person3_region": DRAWN, "regions": regions}
    request = build_request(session, tmp_path, mode="people", **people, **drawn)
    masks = [Image.open(person.mask or "") for person in request.people]
    assert [mask.getbbox() for mask in masks] == [(0, 0, 40, 100), (60, 0, 100, 100)]
    with pytest.raises(OptionError, match="is not drawn yet; draw it below in blue"):
        build_request(
            session,
            tmp_path,
            mode="people",
            person2_reference_images=[(str(anna), None)],
            person2_region=DRAWN,
        )


def test_region_is_a_mask_file_or_a_box(
    session: WebSession, tmp_path: Path, two: dict[str, Any]
) -> None:
    """A mask has any size and may be soft; where it is transparent, it is black."""
    soft = Image.new("RGBA", (50, 200), (255, 255, 255, 0))
    soft.paste((255, 255, 255, 128), (0, 0, 20, 200))
    soft.save(tmp_path / "left.png")
    regions = {
        "person1_region": MASK_FILE,
        "person1_mask": str(tmp_path / "left.png"),
        "person2_region": "0.5, 0.1,1, 0.9",
    }
    request = build_request(session, tmp_path, **two, **regions)
    assert request.people[0].mask == str(tmp_path / "left.png")
    assert open_mask(request.people[0].mask).getextrema() == (0, 128)
    assert request.people[1].box == (0.5, 0.1, 1, 0.9)
    (image,) = generate(session, **two, **regions)
    values, files = restore(Provenance.read(image.file).request)
    assert values["mode"] == "people" and values["several"] is False
    assert values["person1_region"] == MASK_FILE and values["person2_region"] == "0.5,0.1,1,0.9"
    assert files == "Add the same files again: anna.png, left.png."
    again = {**regions, **{name: value for name, value in values.items() if "region" in name}}
    assert build_request(session, tmp_path, **two, **again).people == request.people


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (MASK_FILE, "Region of person 2 is a mask file, and there is none; add the file, or"),
        ("in the middle", "Region must be one of the list, or a box LEFT,TOP,RIGHT,BOTTOM in"),
        ("0,0,1", "such as 0,0,0.5,1, got '0,0,1'"),
        ("0.5,0,0.2,1", "Region must be left, top, right, bottom as fractions"),
        ("0,0,2,1", "Region must be at most 1, got '2'"),
        ("1.2.3,0,1,1", "Region must be a number, got '1.2.3'"),
    ],
)
def test_bad_region_is_one_sentence_at_the_person(
    session: WebSession, two: dict[str, Any], region: str, message: str
) -> None:
    (update,) = run_page(session, **two, person2_region=region)
    text, place = update["problem"]
    assert message in text and place == "person2"


def test_drawn_regions_are_downloaded_as_masks(
    session: WebSession, tmp_path: Path, two: dict[str, Any]
) -> None:
    with gradio.Blocks():
        page = build_layout(session)
    files, message = page.parts["region_files"], page.parts["message"]
    updates = save_regions(session, page, None)
    assert NOT_DRAWN.capitalize()[:20] in updates[message]
    assert NOT_DRAWN in updates[page.parts["drawing_mark"]].lower()
    canvas = draw(tmp_path / "layer.png", red=(0, 0, 40, 100), blue=(60, 0, 100, 100))
    updates = save_regions(session, page, canvas)
    red, blue = map(Path, updates[files].constructor_args["value"])
    assert (red.name, blue.name) == ("region-1.png", "region-2.png")
    assert open_mask(red).getbbox() == (0, 0, 40, 100)
    assert updates[page.parts["drawing_mark"]] == ""
    assert find_text(red, XMP_KEY) is None  # a person has drawn it, and no model
    # the images are those of the drawing
    drawn = {"regions": canvas, "person1_region": DRAWN, "person2_region": DRAWN}
    uploaded = {"person1_region": MASK_FILE, "person2_region": MASK_FILE}
    uploaded |= {"person1_mask": str(red), "person2_mask": str(blue)}
    pixels = [
        np.array(Image.open(generate(session, **two, **regions)[0].file))
        for regions in (drawn, uploaded)
    ]
    assert (pixels[0] == pixels[1]).all()


def test_several_people_are_painted_into_an_image(
    session: WebSession, tmp_path: Path, anna: Path, two: dict[str, Any]
) -> None:
    """Each acts in its own region, and only the painted part changes."""
    canvas = {**draw(tmp_path / "paint.png", paint=(0, 0, 100, 50)), "background": str(anna)}
    regions = draw(tmp_path / "layer.png", red=(0, 0, 40, 100), blue=(60, 0, 100, 100))
    form = {**two, "mode": "edit", "several": True, "edit_image": canvas, "strength": 0.9}
    form |= {"regions": regions, "person1_region": DRAWN, "person2_region": DRAWN}
    (image,) = generate(session, **form)
    assert image.before is not None
    before, after = (np.array(Image.open(file)) for file in (image.before, image.file))
    assert (before[52:] == after[52:]).all() and (before[:44] != after[:44]).mean() > 0.5
    request = Provenance.read(image.file).request
    assert [person.mask for person in request.people] == ["region-1.png", "region-2.png"]
    assert request.init_image is not None and request.init_image.mask == "mask-1.png"
    values, files = restore(request)
    assert values["mode"] == "edit" and values["several"] is True
    assert values["person1_region"] == values["person2_region"] == DRAWN
    assert files == (
        "Add the same files again: anna.png. Paint the area that changes again. "
        "Draw the regions again."
    )
    # one person alone, whatever is in the form of the group
    alone = build_request(session, tmp_path, **{**form, "several": False})
    assert alone.people == () and alone.init_image is not None
    assert show_edited_image(canvas) == {
        "background": str(anna),
        "layers": [],
        "composite": None,
    }


def test_area_that_changes_is_a_mask_file(session: WebSession, tmp_path: Path, anna: Path) -> None:
    upper = Image.new("L", (10, 20))
    upper.paste(255, (0, 0, 10, 10))
    upper.save(tmp_path / "upper.png")
    canvas = {"background": str(anna), "layers": [], "composite": None}
    form = {"mode": "edit", "edit_image": canvas, "edit_mask": str(tmp_path / "upper.png")}
    request = build_request(session, tmp_path, **form)
    assert request.init_image is not None
    assert request.init_image.mask == str(tmp_path / "upper.png")
    _, files = restore(request)
    assert files == "Add the same files again: anna.png, upper.png."
    painted = draw(tmp_path / "paint.png", paint=(0, 0, 50, 50))
    (update,) = run_page(session, **{**form, "edit_image": {**painted, "background": str(anna)}})
    assert update["problem"] == (
        "Area that changes is painted, and there is a mask file; leave one out.",
        "edit",
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of two people, the smaller one on the left."""
    file = tmp_path_factory.mktemp("pair") / "pair.png"
    image = Image.new("RGB", (192, 96), (128, 128, 128))
    image.paste(render_portrait(1_000_011).resize((72, 72)), (0, 12))
    image.paste(render_portrait(1_000_007), (96, 0))
    image.save(file)
    return file


def test_faces_are_counted_in_another_order(
    session: WebSession, tmp_path: Path, pair: Path
) -> None:
    images = {"reference_images": [(str(pair), None)]}
    request = build_request(session, tmp_path, **images, face_order="left-right")
    # the order is a choice: there is no note that the image has several faces
    assert request.people == (Person(images=[pair], face_index=0, face_order="left-right"),)
    with gradio.Blocks():
        page = build_layout(session)

    def save(**values: Any) -> Identity:
        updates = save_identity(session, page, "", {**SETTINGS, **images, **values})
        return Identity.load(updates[page.parts["download"]].constructor_args["value"])

    large, left, right = save(), save(face_order="left-right"), save(face_order="right-left")
    assert large.fingerprint == right.fingerprint != left.fingerprint
    assert save(face_order="left-right", face_index=1).fingerprint == right.fingerprint
    updates = preview_faces(session, page, "", {**SETTINGS, **images, "face_order": "left-right"})
    assert updates[page.parts["problem"]] is None
    values, _ = restore(request.model_copy(update={"num_images": 1}))
    assert values["face_order"] == "left-right" and values["face_index"] == 0


@pytest.mark.parametrize("prefix", ["", *PERSON_PREFIXES])
def test_saved_identity_is_hidden_when_the_person_changes(tmp_path: Path, prefix: str) -> None:
    with gradio.Blocks() as blocks:
        page = build_layout(WebSession(tmp_path))
        connect(WebSession(tmp_path), page)
    button = page.parts[prefix + "download"]
    changes = {
        target
        for event in blocks.fns.values()
        if event.outputs == [button] and event.js == HIDE
        for target in event.targets
    }
    for name in ("reference_images", "identity_file", "face_index", "face_order"):
        assert (page.values[prefix + name]._id, "change") in changes


def test_order_needs_an_image(session: WebSession, tmp_path: Path) -> None:
    (update,) = run_page(
        session, identity_file=str(tmp_path / "anna.safetensors"), face_order="left-right"
    )
    text, place = update["problem"]
    assert text.startswith("Order of the faces cannot be used with an identity file")
    assert place == "person"


def test_people_by_words_have_no_regions(tmp_path: Path) -> None:
    """The page hides the regions, and what was chosen there has no effect."""
    weights = tmp_path / "weights"
    weights.mkdir()
    link_miniature(weights)
    session = WebSession(tmp_path, "cpu", ModelSelection(preset=str(weights)))
    form: dict[str, Any] = {"mode": "people", "preset": str(weights), "method": "fastcomposer"}
    for number, seed in ((1, 3), (3, 4)):
        draw_person(seed).save(tmp_path / f"person-{number}.png")
        upload = [(str(tmp_path / f"person-{number}.png"), None)]
        form[f"person{number}_reference_images"] = upload
    form |= {"prompt": TWO_PEOPLE, "start": 0.0, "person1_region": DRAWN}
    (image,) = generate(session, **form)
    provenance = Provenance.read(image.file)
    people = provenance.request.people
    assert people == (Person(images=["person-1.png"]), Person(images=["person-3.png"]))
    preset = session.preset(session.select_models(str(weights), "fastcomposer"))
    values = read_values(provenance.request, preset)
    assert values["mode"] == "people"
    files = describe_files(provenance)
    assert "person-1.png, person-3.png" in files and "regions" not in files
    again = {name: value for name, value in values.items() if name in SETTINGS}
    (same,) = generate(session, **{**form, **again})
    assert pixels(same) == pixels(image)
    swapped = {
        "person1_reference_images": form["person3_reference_images"],
        "person3_reference_images": form["person1_reference_images"],
    }
    (other,) = generate(session, **{**form, **swapped})
    assert pixels(other) != pixels(image)

    (update,) = run_page(session, **{**form, "prompt": "portrait of a person"})
    text, place = update["problem"]
    assert text.startswith("Prompt has 1 word for 2 people; write one word for each of them")
    assert place == "prompt"
    (update,) = run_page(session, **{**form, "method": "faceid"})
    text, place = update["problem"]
    assert text.startswith("faceid shows one person in an image; leave Reference images out")
    assert place == "person3"

    with gradio.Blocks():
        page = build_layout(session)
    for method, is_visible in (("fastcomposer", False), ("pulid", True)):
        updates = select_method(session, page, str(weights), method)
        parts = [page.values["person2_region"], page.parts["drawing"]]
        assert [updates[part]["visible"] for part in parts] == [is_visible] * 2
        assert ("in this order" in updates[page.parts["group"]]) != is_visible
