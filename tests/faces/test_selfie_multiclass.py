"""Parsing with a small network that has the signature of MediaPipe's selfie_multiclass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openpulid.errors import WeightsError
from openpulid.faces.bisenet import CROP, FaceParser, load_face_parser
from openpulid.faces.selfie_multiclass import SelfieParser
from tests.support.photo_networks import recognition_file, selfie_file


def test_face_and_hair_are_kept(tmp_path: Path) -> None:
    parser = load_face_parser(selfie_file(tmp_path / "model.onnx"))
    crop = torch.zeros(1, 3, CROP, CROP)
    crop[:, 2, :100, 200:300] = 1  # hair above
    crop[:, 0, 100:300, 200:300] = 1  # a face
    crop[:, 1, 300:, 200:300] = 1  # and clothes
    mask = parser(crop)
    expected = torch.zeros(1, 1, CROP, CROP)
    expected[:, :, :300, 200:300] = 1
    assert mask.shape == expected.shape and mask.dtype == torch.float32
    assert (mask != expected).float().mean() < 0.005  # edges, which 256 pixels do not resolve
    assert set(mask.unique().tolist()) == {0, 1}


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="`pulid weights get selfie-multiclass` downloads it"):
        load_face_parser(tmp_path / "model.onnx")
    for file in (
        recognition_file(tmp_path / "recognition.onnx"),
        selfie_file(tmp_path / "model.onnx", num_classes=7),
    ):
        with pytest.raises(WeightsError, match="is not MediaPipe's selfie_multiclass_256x256"):
            SelfieParser.load(file)
    (tmp_path / "model.onnx").write_bytes(b"no network")
    with pytest.raises(WeightsError, match="cannot be opened; download it again"):
        SelfieParser.load(tmp_path / "model.onnx")
    with pytest.raises(WeightsError):
        FaceParser.load(tmp_path / "model.onnx")
