"""Face detection in photos with SCRFD, the detector of insightface's packs.

insightface puts the center of a pixel at whole numbers, `Face` puts its edge there: coordinates of
the two differ by half a pixel.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from openpulid.faces.face import Face
from openpulid.faces.insightface_pack import load_onnx_model, to_uint8
from openpulid.faces.multi_scale import INPUT, SEARCH_DESCRIPTION, detect_at_all_sizes
from openpulid.faces.orientation import detect_in_all_orientations


class SCRFDDetector:
    """SCRFD face detector (arXiv 2105.04714).

    Args:
        model: an insightface detection model.
        threshold: minimum score, 0 to 1.
    """

    def __init__(self, model: Any, threshold: float = 0.5) -> None:
        self.model = model
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
        return SEARCH_DESCRIPTION

    def detect(self, image: Tensor) -> list[Face]:
        """Detect all faces, also in an image that is turned by a quarter or a half.

        Args:
            image: (3, H, W) float in [0, 1].

        Returns:
            Faces without masks, the largest first; an empty list without a face.
        """
        return detect_in_all_orientations(image, self.detect_upright)

    def detect_upright(self, image: Tensor) -> list[Face]:
        """Detect all faces in an image that is known to be upright.

        Args:
            image: (3, H, W) float in [0, 1].

        Returns:
            Faces without masks, the largest first; an empty list without a face.
        """
        return detect_at_all_sizes(image, self._detect_once)

    def _detect_once(self, image: Tensor) -> list[Face]:
        """Run the network once."""
        height, width = image.shape[1:]
        boxes, landmarks = self.model.detect(
            to_uint8(image)[..., ::-1], input_size=(INPUT, INPUT), det_thresh=self.threshold
        )
        limits = torch.tensor([width, height, width, height])
        faces = []
        for box, points in zip(boxes, landmarks, strict=True):
            box = torch.from_numpy(box).float()
            corners = torch.minimum((box[:4] + 0.5).clamp(min=0), limits)
            points = torch.from_numpy(points).float() + 0.5
            faces.append(Face(image, corners, points, float(box[4])))
        return faces
