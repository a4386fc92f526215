"""Face detectors for photos."""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from openpulid.faces.face import Face
from openpulid.faces.insightface_pack import is_yunet
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.faces.yunet import YuNetDetector

LONGEST = 1024
"""Maximum longer side of an image in pixels at detection (PuLID, released code).

A crop of 112 pixels would sample single pixels of a larger image instead of averaging them."""


class PhotoDetector(Protocol):
    """A face detector for photos: `SCRFDDetector` or `YuNetDetector`."""

    @property
    def search_description(self) -> str:
        """What `detect` tries, in words."""

    def detect(self, image: Tensor) -> list[Face]:
        """Return the faces of an image (3, H, W) in [0, 1], also a turned one; largest first."""

    def detect_upright(self, image: Tensor) -> list[Face]:
        """Return the faces of an image (3, H, W) that is known to be upright; largest first."""


def load_photo_detector(
    file: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> PhotoDetector:
    """Load a detector from its ONNX file: YuNet, or a detector of an insightface pack.

    Args:
        file: the ONNX file.
        device: of insightface's detectors; YuNet always runs on the CPU.

    Raises:
        WeightsError: the file is missing or holds no detector.
    """
    if is_yunet(file):
        return YuNetDetector.load(file)
    return SCRFDDetector.load(file, device)
