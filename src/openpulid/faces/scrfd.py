"""Face detection in photos with SCRFD, the detector of insightface's packs.

insightface puts the center of a pixel at whole numbers, `Face` puts its edge there: coordinates of
the two differ by half a pixel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from openpulid.faces.align import GRAY
from openpulid.faces.face import Face
from openpulid.faces.insightface_pack import load_onnx_model, to_uint8
from openpulid.faces.orientation import (
    CLEAR_SCORE,
    SAME_FACE,
    detect_in_all_orientations,
    overlap,
)

LONGEST = 1024
"""Maximum longer side of an image in pixels at detection (PuLID, released code).

A crop of 112 pixels would sample single pixels of a larger image instead of averaging them."""

INPUT = 640
"""Width and height of the input of the detector in pixels."""

BORDERS = (0.0, 0.5, 1.5)
"""Widths of a border around the image as shares of its longer side, in the order of the attempts.

A face that fills the image is only detected at a smaller size and with space around it. With these
borders, the image has 640, 320 and 160 pixels of the input."""

CLOSE_UP = 0.4
"""Share of the longer side of an image from which no larger face can be missed at full size.

SCRFD detects faces of two thirds of the image and misses some of five sixths."""


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
        return "three sizes, in four orientations"

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

        A face that is larger than those detected at full size is looked for with a border: a
        close-up is easily missed next to small faces. Without a border, the result is that of
        insightface.

        Args:
            image: (3, H, W) float in [0, 1].

        Returns:
            Faces without masks, the largest first; an empty list without a face.
        """
        faces: list[Face] = []
        for border in BORDERS:
            faces = _merge(faces, self._detect_with_border(image, border))
            is_second_look = border > 0
            if faces and (is_second_look or _is_clear_close_up(faces[0])):
                break
        return faces

    def _detect_with_border(self, image: Tensor, border: float) -> list[Face]:
        """Detect faces at the size that a border leaves for the image, in pixels of `image`."""
        if not border:
            return self._detect_once(image)
        height, width = image.shape[1:]
        scale = INPUT / (1 + 2 * border) / max(height, width)
        size = [max(1, round(side * scale)) for side in (height, width)]
        small = interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        top = (INPUT - size[0]) // 2
        left = (INPUT - size[1]) // 2
        bottom = INPUT - size[0] - top
        right = INPUT - size[1] - left
        padded = pad(small, (left, right, top, bottom), value=GRAY)
        offset = torch.tensor([left, top])
        pixels = torch.tensor([width / size[1], height / size[0]])
        limits = torch.tensor([width, height])
        faces = []
        for face in self._detect_once(padded):
            corners = (face.box.reshape(2, 2) - offset) * pixels
            box = torch.minimum(corners.clamp(min=0), limits).flatten()
            landmarks = (face.landmarks - offset) * pixels
            faces.append(replace(face, image=image, box=box, landmarks=landmarks))
        return faces

    def _detect_once(self, image: Tensor) -> list[Face]:
        """Run the network once."""
        height, width = image.shape[1:]
        if INPUT * min(height, width) < max(height, width):
            return []  # less than a pixel high or wide in the input
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


def _merge(faces: Sequence[Face], smaller: Sequence[Face]) -> list[Face]:
    """Add what is detected at a smaller size: larger faces, and clearer detections of a face."""
    largest = faces[0].area if faces else 0
    merged = list(faces)
    for face in smaller:
        rivals = [rival for rival in merged if overlap(face, rival) > SAME_FACE]
        is_clearer = all(rival.score < min(face.score, CLEAR_SCORE) for rival in rivals)
        if is_clearer if rivals else face.area > largest:
            merged = [*(rival for rival in merged if rival not in rivals), face]
    return sorted(merged, key=lambda face: -face.area)


def _is_clear_close_up(face: Face) -> bool:
    """Return whether a face is clear, and so large that there is no space for a larger one."""
    sides = face.box[2:] - face.box[:2]
    is_close_up = float(sides.max()) >= CLOSE_UP * max(face.image.shape[1:])
    return is_close_up and face.score >= CLEAR_SCORE
