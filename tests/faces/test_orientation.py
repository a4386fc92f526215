"""Faces in images that are turned by a quarter or a half."""

from __future__ import annotations

from dataclasses import replace

import pytest
import skimage.data
import torch

from openpulid.faces.align import TEMPLATE, turn_points
from openpulid.faces.bisenet import align_photo
from openpulid.faces.face import Face, describe_defects, describe_faces
from openpulid.faces.orientation import detect_in_all_orientations, is_upright, roll, turn_back
from openpulid.faces.scrfd import SCRFDDetector
from tests.support.photo_networks import DETECTOR, needs_detector

IMAGE = torch.rand(3, 80, 100, generator=torch.Generator().manual_seed(0))
UPRIGHT = Face(
    IMAGE, torch.tensor([20.0, 10, 60, 60]), TEMPLATE * 40 + torch.tensor([20.0, 15]), 0.9
)


def turn(face: Face, turns: int) -> Face:
    """Turn a face and its image."""
    size = (face.image.shape[2], face.image.shape[1])
    corners = turn_points(face.box.reshape(2, 2), turns, size)
    return replace(
        face,
        image=torch.rot90(face.image, turns, (1, 2)),
        box=torch.cat([corners.amin(0), corners.amax(0)]),
        landmarks=turn_points(face.landmarks, turns, size),
    )


@pytest.mark.parametrize("turns", [-1, 0, 1, 2, 3])
def test_points_turn_with_their_image(turns: int) -> None:
    image = torch.zeros(1, 5, 7)
    image[0, 1, 4] = 1
    turned = turn_points(torch.tensor([[4.5, 1.5]]), turns, (7, 5))
    (position,) = torch.rot90(image, turns, (1, 2))[0].nonzero()
    assert torch.equal(turned[0], position.flip(0) + 0.5)
    back = turn_points(turned, -turns, (7, 5) if turns % 2 == 0 else (5, 7))
    assert torch.equal(back, torch.tensor([[4.5, 1.5]]))


@pytest.mark.parametrize(("turns", "degrees"), [(0, 0), (1, -90), (2, 180), (3, 90)])
def test_roll_of_a_turned_face(turns: int, degrees: float) -> None:
    face = turn(UPRIGHT, turns)
    assert abs(abs(roll(face)) - abs(degrees)) < 1e-3 and is_upright(face) == (turns == 0)
    if degrees in (-90, 90):
        assert abs(roll(face) - degrees) < 1e-3
    back = turn_back(face, IMAGE, turns)
    assert torch.allclose(back.landmarks, UPRIGHT.landmarks)
    assert torch.equal(back.box, UPRIGHT.box) and back.turns == turns


def test_landmarks_and_image_are_made_upright() -> None:
    """What draws or encodes the whole image sees the face upright."""
    for turns in (1, 2, 3):
        face = replace(turn(UPRIGHT, -turns), turns=turns)
        assert torch.equal(face.upright_image, IMAGE)
        assert torch.allclose(face.normalized_landmarks, UPRIGHT.normalized_landmarks)


def in_copy(turns: int, score: float, left: float = 20) -> Face:
    """Return an upright face in a turned copy of the image."""
    shift = torch.tensor([left - 20, 0])
    return replace(
        UPRIGHT,
        image=torch.rot90(IMAGE, turns, (1, 2)),
        box=UPRIGHT.box + shift.repeat(2),
        landmarks=UPRIGHT.landmarks + shift,
        score=score,
    )


def detect_in_order(*results: list[Face]) -> list[Face]:
    """Detect with a detector that returns these faces, one list per orientation."""
    remaining = list(results)
    faces = detect_in_all_orientations(IMAGE, lambda image: remaining.pop(0))
    assert not remaining
    return faces


def test_copies_replace_worse_detections_of_a_face() -> None:
    third = in_copy(3, 0.8)
    sideways = replace(turn_back(third, IMAGE, 3), turns=0, score=0.95)
    assert abs(roll(sideways)) == pytest.approx(90)
    (face,) = detect_in_order([sideways], [], [], [third])
    assert face.turns == 3 and torch.equal(face.landmarks, sideways.landmarks)
    assert detect_in_order([sideways], [], [], []) == [sideways]

    # an upright face that is not clear: only a better detection replaces it
    unclear = replace(UPRIGHT, score=0.6)
    assert detect_in_order([unclear], [], [in_copy(2, 0.58, left=40)], []) == [unclear]
    assert detect_in_order([unclear], [], [in_copy(2, 0.8, left=40)], [])[0].turns == 2


def test_what_is_a_face_in_a_copy_alone_must_be_clear() -> None:
    assert detect_in_order([], [in_copy(1, 0.66)], [], []) == []
    assert len(detect_in_order([], [in_copy(1, 0.75)], [], [])) == 1
    assert detect_in_order([UPRIGHT]) == [UPRIGHT]  # no copy is made for a clear face


def test_turned_face_is_described() -> None:
    face = replace(UPRIGHT, turns=3, defects=frozenset({"small"}))
    assert describe_faces([face], label="a.jpg") == [
        "a.jpg: face 0 at 20,10 to 60,60, score 0.90, turn by 90 degrees clockwise, small"
    ]
    assert describe_defects(face, "a.jpg") == [
        "a.jpg: the face is not upright; it is read after turning by 90 degrees clockwise.",
        "a.jpg: the face is only 40 pixels wide in the image of 100 x 80 pixels, so its identity "
        "is uncertain; use a larger image, or crop it around the face.",
    ]


@needs_detector
def test_turned_photo_gives_the_same_landmarks() -> None:
    detector = SCRFDDetector.load(DETECTOR)
    image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255
    (face,) = detector.detect(image)
    eye_distance = (face.landmarks[1] - face.landmarks[0]).norm()
    for count in (1, 2, 3):
        turned = torch.rot90(image, count, (1, 2)).contiguous()
        (detected,) = detector.detect(turned)
        assert (detected.turns + count) % 4 == 0
        back = turn_points(detected.landmarks, -count, (512, 512))
        assert (back - face.landmarks).norm(dim=1).max() < 0.1 * eye_distance
        assert (align_photo(detected) - align_photo(face)).abs().mean() < 0.01
