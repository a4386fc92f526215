"""YuNet: its real file on real photos, and a small network with its signature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openpulid.errors import WeightsError
from openpulid.faces.bisenet import TEMPLATE
from openpulid.faces.insightface_pack import find_pack
from openpulid.faces.photo_detector import load_photo_detector
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.faces.yunet import YuNetDetector
from openpulid.io.images import open_image
from tests.support.photo_networks import (
    DETECTOR,
    GROUP,
    NOSE_CELL,
    PHOTOS,
    YUNET,
    needs_yunet,
    recognition_file,
    yunet_file,
)

NAMES = ["hinton", "lecun", "lifeifei", "liuyifei", "pengwei", "rihanna", "zcy"]


def load_image(path: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1).float() / 255


@needs_yunet
@pytest.mark.parametrize("name", NAMES)
def test_face_of_a_photo_is_that_of_scrfd(name: str) -> None:
    image = load_image(next(PHOTOS.glob(f"{name}.*")))
    (face,) = YuNetDetector.load(YUNET).detect(image)
    (expected,) = SCRFDDetector.load(DETECTOR).detect(image)
    eyes = (expected.landmarks[0] - expected.landmarks[1]).norm()
    assert face.turns == 0 and face.score > 0.92
    # measured: 3% to 9% of the distance between the eyes; without the mirror image 11%
    assert (face.landmarks - expected.landmarks).norm(dim=1).mean() < 0.1 * eyes


@needs_yunet
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turned_face_is_detected(turns: int) -> None:
    """YuNet reports a face that is upside down as an upright one, with a lower score."""
    detector = YuNetDetector.load(YUNET)
    image = load_image(PHOTOS / "lifeifei.jpg")
    (upright,) = detector.detect(image)
    (face,) = detector.detect(torch.rot90(image, -turns, (1, 2)).contiguous())
    assert face.turns == turns
    assert (face.upright_image == image).all()
    points = face.normalized_landmarks - upright.normalized_landmarks
    assert points.norm(dim=1).max() < 0.01


@needs_yunet
def test_close_up_and_group() -> None:
    detector = YuNetDetector.load(YUNET)
    image = load_image(PHOTOS / "lecun.jpg")
    (face,) = detector.detect(image)
    x1, y1, x2, y2 = face.box.int().tolist()
    (tight,) = detector.detect(image[:, y1:y2, x1:x2].contiguous())
    assert tight.score > 0.92 and tight.width > 0.8 * (x2 - x1)
    faces = detector.detect(load_image(GROUP))
    assert len(faces) == 6 and [f.area for f in faces] == sorted(f.area for f in faces)[::-1]
    assert detector.detect(torch.full((3, 300, 200), 0.5)) == []


def test_coordinates_are_pixels_of_the_image(tmp_path: Path) -> None:
    """A face of an image of half the size of the input has half the size."""
    detector = load_photo_detector(yunet_file(tmp_path / "yunet.onnx"))
    image = torch.full((3, 320, 192), 0.5)
    side = NOSE_CELL // 2
    image[:, 160 : 160 + side, 96 : 96 + side] = torch.tensor([1.0, 0, 0])[:, None, None]
    (face,) = detector.detect(image)
    nose = torch.tensor([96 + side / 2, 160 + side / 2])
    offsets = torch.tensor(TEMPLATE) / 4
    offsets = offsets - offsets[2]
    # the template is averaged with its mirror image
    mirrored = offsets[[1, 0, 2, 4, 3]] * torch.tensor([-1, 1])
    expected = (offsets + mirrored) / 2
    torch.testing.assert_close(face.landmarks - nose, expected, atol=0.02, rtol=0)
    assert (offsets - expected).abs().max() > 0.1
    half = torch.tensor([32.0, 40.0])
    torch.testing.assert_close(face.box, torch.cat([nose - half, nose + half]), atol=0.1, rtol=0)
    assert face.score > 0.95 and face.image is image


def test_detector_is_told_apart_by_its_content(tmp_path: Path) -> None:
    yunet_file(tmp_path / "b.onnx")
    recognition_file(tmp_path / "a.onnx")
    assert find_pack(tmp_path) == (tmp_path / "b.onnx", tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match=r"a.onnx is not YuNet's file; `pulid weights get yun"):
        YuNetDetector.load(tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match="does not exist"):
        YuNetDetector.load(tmp_path / "c.onnx")
    damaged = (tmp_path / "b.onnx").read_bytes()[:-100]
    (tmp_path / "b.onnx").write_bytes(damaged)
    with pytest.raises(WeightsError, match="cannot be opened; download it again"):
        YuNetDetector.load(tmp_path / "b.onnx")
