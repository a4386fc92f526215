"""The miniature's face detector: shapes, gradients, and the conversion to `Face`."""

import pytest
import torch

from openpulid.faces.face import Face
from openpulid.faces.miniature import (
    FACE,
    MiniDetection,
    MiniFaceDetector,
    _boxes,
    _centers_of_mass,
)


class BrightSquareDetector(MiniFaceDetector):
    """Detects the bright square of a dark image in closed form, to test `detect` alone."""

    def forward(self, images):
        bright = (images.mean(1, keepdim=True) > 0.8).float()
        parts = torch.full((len(images), 8, 96, 96), -5.0)
        parts[:, FACE : FACE + 1] = 10 * bright - 5
        parts[:, :1] = 5 - 10 * bright
        mass = bright[:, 0] / bright.sum((1, 2, 3)).clamp(min=1)[:, None, None]
        axis = torch.arange(96) + 0.5
        center = torch.stack([(mass.sum(1) * axis).sum(-1), (mass.sum(2) * axis).sum(-1)], -1)
        score = torch.where(bright.sum((1, 2, 3)) > 0, 3.0, -3.0)
        return MiniDetection(score, _boxes(parts), center[:, None].expand(-1, 5, 2), parts)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return MiniFaceDetector().eval()


def test_shapes(detector):
    detection = detector(torch.rand(2, 3, 96, 96))
    assert detection.score_logit.shape == (2,)
    assert detection.box.shape == (2, 4)
    assert detection.landmarks.shape == (2, 5, 2)
    assert detection.parts.shape == (2, 8, 96, 96)
    assert detection.face.shape == (2, 1, 96, 96)
    assert 300_000 < sum(p.numel() for p in detector.parameters()) < 1_000_000


def test_outputs_are_differentiable_in_image(detector):
    images = torch.rand(1, 3, 96, 96).requires_grad_()
    detection = detector(images)
    (
        detection.score_logit.sum() + detection.landmarks.sum() + detection.parts.square().sum()
    ).backward()
    assert images.grad.abs().sum() > 0


def test_center_of_sharp_heat_map_is_its_pixel():
    maps = torch.full((1, 5, 24, 24), -50.0)
    maps[0, :, 3, 10] = 50.0
    assert torch.allclose(_centers_of_mass(maps), torch.tensor([42.0, 14.0]).expand(1, 5, 2))


def test_box_encloses_face_and_ignores_specks():
    parts = torch.zeros(2, 8, 96, 96)
    parts[:, 0] = 1.0
    parts[0, FACE, 20:50, 30:70] = 2.0
    parts[0, FACE, 90, 90] = 2.0
    assert _boxes(parts).tolist() == [[30, 20, 70, 50], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("height", "width"), [(96, 96), (192, 192), (192, 96), (120, 300), (33, 57)]
)
def test_face_is_in_pixels_of_image_of_any_size(height, width):
    image = torch.zeros(3, height, width)
    x1, y1, x2, y2 = width // 3, height // 3, width * 2 // 3, height * 2 // 3
    image[:, y1:y2, x1:x2] = 1.0
    faces = BrightSquareDetector().detect([image, torch.zeros(3, 50, 70)])
    assert faces[1] is None
    face = faces[0]
    assert isinstance(face, Face) and face.image is image
    side = max(height, width) / 96
    assert torch.allclose(
        face.box, torch.tensor([x1, y1, x2, y2], dtype=torch.float32), atol=1.6 * max(side, 1)
    )
    middle = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2])
    assert torch.allclose(face.landmarks, middle.expand(5, 2), atol=max(side, 1))
    assert face.mask.shape == (1, height, width)
    overlap = (face.mask * (image[:1] > 0)).sum() / torch.maximum(
        face.mask, (image[:1] > 0).float()
    ).sum()
    assert overlap > 0.8
    assert face.score == pytest.approx(0.9526, abs=1e-3)
    assert face.area == pytest.approx((x2 - x1) * (y2 - y1), rel=0.35)
    probabilities = BrightSquareDetector().segment(image[None])
    assert torch.equal((probabilities[0] > 0.5).float(), face.mask)


def test_no_face_below_threshold():
    image = torch.zeros(3, 96, 96)
    image[:, 30:60, 30:60] = 1.0
    assert BrightSquareDetector().detect(image[None], threshold=0.99) == [None]
    assert BrightSquareDetector().detect([]) == []
