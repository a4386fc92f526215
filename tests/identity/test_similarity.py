"""Whether reference images show one person, and other notes about them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from PIL import Image, ImageFilter

from openpulid.faces.arcface import ARCFACE_SIMILARITY
from openpulid.identity.extractor import MiniExtractor
from openpulid.identity.reference import ReferenceFaces
from openpulid.identity.similarity import compute_similarities, find_subject
from openpulid.io.image_grid import to_pil
from openpulid.pipelines.factory import load_extractor
from openpulid.pipelines.presets import mini
from openpulid.world import Person, render
from openpulid.world.gallery import SCENES, render_portrait

ANNA, BEN, CAROL = 1_000_007, 1_000_011, 1_000_000


@pytest.fixture(scope="module")
def extractor() -> MiniExtractor:
    return load_extractor(mini(), torch.device("cpu"))  # type: ignore[return-value]


def named(image: Image.Image, name: str) -> Image.Image:
    image.filename = name  # type: ignore[attr-defined]
    return image


def portraits(seed: int, name: str) -> list[Image.Image]:
    """Render a person in three scenes."""
    images = to_pil(render([Person.from_seed(seed)] * 3, SCENES[:3], 96).image)
    return [named(image, f"{name}{k}.png") for k, image in enumerate(images)]


def notes(
    extractor: MiniExtractor, images: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> list[str]:
    caplog.clear()
    ReferenceFaces.detect(extractor, images).identity()
    return [record.getMessage() for record in caplog.records]


def test_another_person_is_named(extractor, caplog) -> None:
    anna, ben = (named(render_portrait(seed), f"{seed}.png") for seed in (ANNA, BEN))
    (note,) = notes(extractor, [anna, ben], caplog)
    assert note.startswith("1000011.png: looks like another person than 1000007.png (similarity ")


@pytest.mark.parametrize("gap", [0, 96])
def test_two_people_in_one_image_have_two_faces(extractor, gap: int) -> None:
    image = Image.new("RGB", (192 + gap, 96), "gray")
    alone = []
    for left, seed in ((0, ANNA), (96 + gap, BEN)):
        portrait = render_portrait(seed)
        alone.append(ReferenceFaces.detect(extractor, portrait).identity())
        image.paste(portrait, (left, 0))
    faces = ReferenceFaces.detect(extractor, image)
    for index in (0, 1):
        chosen = faces.identity(index, "left-right").id_cond
        same, other = (
            float(torch.cosine_similarity(chosen, identity.id_cond, dim=-1))
            for identity in (alone[index], alone[1 - index])
        )
        assert same > 0.9 > other


def test_images_of_one_person_give_no_note(extractor, caplog) -> None:
    for seed in (ANNA, BEN, CAROL):
        for pair in combinations(portraits(seed, "one"), 2):
            assert notes(extractor, list(pair), caplog) == []


def test_the_stranger_among_several_images_is_named(extractor, caplog) -> None:
    anna, ben, carol = (
        portraits(seed, name) for seed, name in ((ANNA, "a"), (BEN, "b"), (CAROL, "c"))
    )
    assert [note.split(":")[0] for note in notes(extractor, [ben[0], *anna], caplog)] == ["b0.png"]
    mixed = [anna[0], ben[0], anna[1], ben[1], carol[0]]
    assert [note.split(":")[0] for note in notes(extractor, mixed, caplog)] == [
        "b0.png",
        "b1.png",
        "c0.png",
    ]


def test_subject_is_found_through_chains() -> None:
    similarities = torch.eye(5)
    for one, other in ((1, 2), (2, 3)):
        similarities[one, other] = similarities[other, one] = ARCFACE_SIMILARITY
    assert find_subject(similarities, ARCFACE_SIMILARITY) == [1, 2, 3]
    assert find_subject(torch.eye(3), ARCFACE_SIMILARITY) == [0]
    assert torch.allclose(compute_similarities(3 * torch.eye(2)), torch.eye(2))


def test_turned_image_gives_the_same_identity(extractor, caplog) -> None:
    portrait = render_portrait(ANNA)
    expected = ReferenceFaces.detect(extractor, portrait).identity()
    assert caplog.records == []
    for turn, words in (
        (Image.Transpose.ROTATE_90, "90 degrees clockwise"),
        (Image.Transpose.ROTATE_180, "180 degrees"),
        (Image.Transpose.ROTATE_270, "90 degrees counterclockwise"),
    ):
        caplog.clear()
        reference = ReferenceFaces.detect(extractor, named(portrait.transpose(turn), "a.png"))
        identity = reference.identity()
        assert torch.cosine_similarity(identity.id_cond, expected.id_cond, dim=-1) > 0.999
        assert torch.allclose(identity.landmarks, expected.landmarks, atol=0.01)
        assert [record.getMessage() for record in caplog.records] == [
            f"a.png: the face is not upright; it is read after turning by {words}."
        ]
        reference.draw()
        assert len(caplog.records) == 1  # the note is not repeated


def test_small_and_blurred_faces_are_noted(extractor, caplog) -> None:
    portrait = render_portrait(ANNA)
    blurred = named(portrait.filter(ImageFilter.GaussianBlur(2)), "blurred.png")
    (note,) = notes(extractor, [blurred], caplog)
    assert note.startswith("blurred.png: the face is blurred")
    (note,) = notes(extractor, [named(portrait.resize((40, 40)), "small.png")], caplog)
    assert note.startswith("small.png: the face is only 26 pixels wide in the image of 40 x 40")
    assert notes(extractor, [portrait], caplog) == []
