"""Face detection in photos with SCRFD, the detector of insightface's packs.

insightface puts the center of a pixel at whole numbers, `Face` puts its edge there: coordinates of
the two differ by half a pixel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from openpulid.faces.face import Face
from openpulid.faces.insightface_pack import load_onnx_model, to_uint8

LONGEST = 1024
"""Maximum longer side of an image in pixels at detection (PuLID, released code).

A crop of 112 pixels would sample single pixels of a larger image instead of averaging them."""

SIZES = (640, 512, 384, 256)
"""Input sizes of the detector in the order of the attempts: a large face needs a small size."""

BORDER = 0.5
"""Width of the gray border of the last attempts, as a share of the longer side.

A face that fills the image is only detected with space around it."""


class SCRFDDetector:
    """SCRFD face detector (arXiv 2105.04714).

    Args:
        model: an insightface detection model.
        sizes: input sizes, tried in this order until a face is detected; then all are tried again
            on a copy of the image with a border.
        threshold: minimum score, 0 to 1.
    """

    def __init__(self, model: Any, sizes: Sequence[int] = SIZES, threshold: float = 0.5) -> None:
        self.model = model
        self.sizes = tuple(sizes)
        self.threshold = threshold

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], device: str | torch.device = "cpu", **options: Any
    ) -> SCRFDDetector:
        """Load a detector from an ONNX file.

        Raises:
            WeightsError: the file is missing or holds no detector.
        """
        return cls(load_onnx_model(file, device, "detect"), **options)

    @property
    def search_description(self) -> str:
        """What `detect` tries, in words."""
        return f"sizes {', '.join(map(str, self.sizes))} and a copy with a border"

    def detect(self, image: Tensor) -> list[Face]:
        """Detect all faces at the first input size at which there are any.

        Args:
            image: (3, H, W) float in [0, 1].

        Returns:
            Faces without masks, the largest first; an empty list without a face.
        """
        for size in self.sizes:
            if faces := self._detect_at_size(image, image, size, 0):
                return faces
        margin = round(BORDER * max(image.shape[1:]))
        padded = pad(image, (margin,) * 4, value=0.5)
        for size in self.sizes:
            if faces := self._detect_at_size(image, padded, size, margin):
                return faces
        return []

    def _detect_at_size(self, image: Tensor, padded: Tensor, size: int, margin: int) -> list[Face]:
        """Detect faces in `padded`, which is `image` with a margin, in pixels of `image`."""
        if size * min(padded.shape[1:]) < max(padded.shape[1:]):
            return []  # a strip of less than one pixel at this size, which OpenCV cannot resize to
        boxes, landmarks = self.model.detect(
            to_uint8(padded)[..., ::-1], input_size=(size, size), det_thresh=self.threshold
        )
        height, width = image.shape[1:]
        limits = torch.tensor([width, height, width, height])
        shift = 0.5 - margin
        faces = []
        for box, points in zip(boxes, landmarks, strict=True):
            box = torch.from_numpy(box).float()
            corners = torch.minimum((box[:4] + shift).clamp(min=0), limits)
            points = torch.from_numpy(points).float() + shift
            faces.append(Face(image, corners, points, float(box[4])))
        return sorted(faces, key=lambda face: -face.area)
