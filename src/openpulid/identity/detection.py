"""Face detection as identity extractors need it: on one image, with hints for error messages."""

from __future__ import annotations

from os import PathLike
from typing import Protocol

import torch
from torch import Tensor

from openpulid.faces.face import Face
from openpulid.faces.miniature import SIZE, MiniFaceDetector
from openpulid.faces.scrfd import LONGEST, SCRFDDetector
from openpulid.io.checkpoints import load_module

MAX_ASPECT = 16
"""Longer over shorter side of an image from which the miniature sees at most 6 pixels."""


class FaceDetection(Protocol):
    """Detects the faces in one image."""

    max_image_size: int | None
    """Images are reduced to this longest side in pixels; None leaves them as they are."""

    no_face_hint: str
    """What to do if no face is detected."""

    @property
    def search_description(self) -> str:
        """What `detect` tries before it gives up."""

    def detect(self, image: Tensor) -> list[Face]:
        """Return the faces in an image (3, H, W) in [0, 1]."""


class PhotoFaceDetection:
    """Detects faces in photos with SCRFD, the largest first."""

    max_image_size: int | None = LONGEST
    no_face_hint = "use an image in which one face is large and seen from the front."

    def __init__(self, detector: SCRFDDetector) -> None:
        self.detector = detector

    @classmethod
    def load(cls, path: str | PathLike[str], device: str | torch.device) -> PhotoFaceDetection:
        """Load the detector from its ONNX file.

        Raises:
            WeightsError: the file is missing or damaged.
        """
        return cls(SCRFDDetector.load(path, device))

    @property
    def search_description(self) -> str:
        """What `detect` tries before it gives up."""
        return self.detector.search_description

    def detect(self, image: Tensor) -> list[Face]:
        """Return the faces in an image (3, H, W) in [0, 1], the largest first."""
        return self.detector.detect(image)


class MiniFaceDetection:
    """Detects the face of one of the miniature's synthetic people; at most one in an image."""

    max_image_size: int | None = None  # the detector resizes images itself
    no_face_hint = (
        "this preset only detects one synthetic person per image (`pulid world person` draws one); "
        "use a full-size preset for photos."
    )

    def __init__(self, detector: MiniFaceDetector) -> None:
        self.detector = detector

    @classmethod
    def load(cls, path: str | PathLike[str], device: str | torch.device) -> MiniFaceDetection:
        """Load the detector from its file.

        Raises:
            WeightsError: the file is missing or damaged.
        """
        return cls(load_module(MiniFaceDetector, path, device))

    @property
    def search_description(self) -> str:
        """What `detect` tries before it gives up."""
        return f"one size: {SIZE} pixels"

    def detect(self, image: Tensor) -> list[Face]:
        """Return the face in an image (3, H, W) in [0, 1], or an empty list."""
        if max(image.shape[1:]) > MAX_ASPECT * min(image.shape[1:]):
            return []  # the detector pads to a square, which may not fit into memory
        return [face for face in self.detector.detect([image]) if face is not None]
