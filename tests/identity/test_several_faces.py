"""Several people in a reference image of the miniature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from openpulid import load
from openpulid.identity.detection import MiniFaceDetection
from openpulid.io.image_grid import to_pil
from openpulid.mini.data.pairs import join_sides
from openpulid.pipelines.presets import MINIATURE
from openpulid.world import Person, Scene, render

SCENES = [Scene(hair_color="black"), Scene(expression="smile", hair_color="red")]


@pytest.fixture(scope="module")
def detection() -> MiniFaceDetection:
    return MiniFaceDetection.load(MINIATURE / "detector.safetensors", "cpu")


@pytest.fixture(scope="module")
def portraits() -> Tensor:
    """(2, 4, 96, 96); the last channel is one on the person."""
    drawn = render([Person.from_seed(3), Person.from_seed(5)], SCENES)
    return torch.cat([drawn.image, drawn.person], dim=1)


@pytest.fixture(scope="module")
def pair(portraits: Tensor) -> Tensor:
    return join_sides(portraits[:1], portraits[1:])[0, :3]


def test_each_face_is_where_it_is_in_its_portrait(detection, portraits, pair) -> None:
    singles = [detection.detect(portrait[:3])[0] for portrait in portraits]
    faces = sorted(detection.detect(pair), key=lambda face: float(face.box[0]))
    assert len(faces) == 2
    for face, single, left in zip(faces, singles, (0, 64), strict=True):
        box = single.box + torch.tensor([left, 0, left, 0])
        assert (face.box - box).abs().max() < 8
        points = single.landmarks + torch.tensor([left, 0])
        assert (face.landmarks - points).abs().max() < 3
        assert face.image is pair and not face.defects
        expected = pad(single.mask, (left, 64 - left))
        assert face.mask.shape == (1, 96, 160)
        assert (face.mask != expected).float().mean() < 0.02


def test_faces_of_a_pair_can_be_chosen(portraits, pair, tmp_path: Path) -> None:
    studio = load("mini", device="cpu")
    to_pil(pair[None])[0].save(tmp_path / "pair.png")
    faces = studio.detect(tmp_path / "pair.png")
    for index in (0, 1):
        chosen = faces.identity(index, "left-right")
        similarity = [
            float(cosine_similarity(chosen.id_cond, studio.identify(single).id_cond, dim=-1))
            for single in to_pil(portraits[:, :3])
        ]
        assert similarity[index] > 0.9 > 0.6 > similarity[1 - index]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_one_person_has_one_face(detection, portraits, turns: int) -> None:
    for portrait in portraits[:, :3]:
        assert len(detection.detect(torch.rot90(portrait, turns, (1, 2)))) == 1


def test_larger_image_of_two_people(detection, pair) -> None:
    large = torch.nn.functional.interpolate(pair[None], (480, 800), mode="bilinear")[0]
    above = torch.cat([torch.full((3, 200, 800), 0.5), large], dim=1)
    assert len(detection.detect(above)) == 2
