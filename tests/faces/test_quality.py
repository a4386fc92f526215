"""Small and blurred faces."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import skimage.data
import torch
from PIL import Image, ImageFilter

from openpulid.faces.face import Face
from openpulid.faces.quality import MIN_SHARPNESS, find_defects, sharpness
from openpulid.io.image_grid import to_tensor

LANDMARKS = torch.tensor([[206.0, 102], [248, 105], [230, 128], [211, 143], [242, 145]])
"""Of the astronaut's face, which is 90 pixels wide."""


def astronaut(blur: float = 0, size: int = 512) -> Face:
    image = Image.fromarray(skimage.data.astronaut()).filter(ImageFilter.GaussianBlur(blur))
    tensor = to_tensor([image.resize((size, size), Image.Resampling.LANCZOS)])[0]
    scale = size / 512
    box = torch.tensor([181.0, 56, 271, 178]) * scale
    return Face(tensor, box, LANDMARKS * scale, 0.82)


@pytest.mark.parametrize(
    ("blur", "size", "expected"),
    [
        (0, 512, set()),
        (0, 1024, set()),
        (9, 512, {"blurred"}),
        (3, 512, {"blurred"}),
        (1, 512, set()),
        (18, 1024, {"blurred"}),
        (0, 256, {"small"}),
        (9, 128, {"small"}),
    ],
)
def test_defects_of_a_face(blur: float, size: int, expected: set[str]) -> None:
    face = astronaut(blur * size / 512 if size > 512 else blur, size)
    assert find_defects(face, 64).defects == expected


def test_sharpness_does_not_depend_on_size_and_contrast() -> None:
    values = [sharpness(astronaut(size=size)) for size in (512, 768, 1024)]
    assert min(values) > 0.1 and max(values) < 1.5 * min(values)
    face = astronaut()
    dark = replace(face, image=0.1 + 0.3 * face.image)
    assert sharpness(dark) == pytest.approx(sharpness(face), rel=1e-3)
    assert sharpness(astronaut(2)) < MIN_SHARPNESS < sharpness(astronaut(1))
    assert sharpness(replace(face, image=torch.zeros(3, 512, 512))) == math.inf


def test_face_without_usable_landmarks_is_as_it_was() -> None:
    face = replace(astronaut(), landmarks=torch.full((5, 2), math.nan))
    assert find_defects(face, 64) is face


def test_tilted_face_is_a_defect() -> None:
    face = astronaut()
    sideways = replace(face, image=torch.rot90(face.image, 1, (1, 2)), landmarks=LANDMARKS.flip(1))
    assert "tilted" in find_defects(sideways, 64).defects
