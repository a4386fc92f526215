"""Face detection as identity extractors need it: on one image, with hints for error messages."""

from __future__ import annotations

from os import PathLike
from typing import Protocol

import torch
from torch import Tensor

from openpulid.faces.face import Face
from openpulid.faces.miniature import SIZE, MiniFaceDetector
from openpulid.faces.orientation import detect_in_all_orientations
from openpulid.faces.quality import find_defects
from openpulid.faces.scrfd import LONGEST, SCRFDDetector
from openpulid.io.checkpoints import load_module

MAX_ASPECT = 16
"""Longer over shorter side of an image from which the miniature sees at most 6 pixels."""
MIN_FACE = 64
"""Smallest useful face in a photo, in pixels: face recognition reads it at 112, the vision encoder
at 336."""

MINI_MIN_FACE = 32
"""Smallest useful face of a synthetic person, in pixels of the image and of the detector's input.

The embedding of a face of 58 pixels that is reduced to 30 has a similarity of at least 0.93 to the
original, of 19 pixels 0.75, of 15 pixels 0.40."""


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
        """Return the faces in an image (3, H, W) in [0, 1], also in a turned one."""


class PhotoFaceDetection:
    """Detects faces in photos with SCRFD, the largest first."""

    max_image_size: int | None = LONGEST
    no_face_hint = "use an image in which one face is large, upright and seen from the front."

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
        """Return the faces in an image (3, H, W) in [0, 1], also a turned one; largest first."""
        return [find_defects(face, MIN_FACE) for face in self.detector.detect(image)]


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
        """Return the face in an image (3, H, W) in [0, 1], also a turned one, or an empty list."""
        if max(image.shape[1:]) > MAX_ASPECT * min(image.shape[1:]):
            return []  # the detector pads to a square, which may not fit into memory
        # the detector reads the whole image at its own size
        min_width = MINI_MIN_FACE * max(1, max(image.shape[1:]) / SIZE)
        faces = detect_in_all_orientations(image, self._detect_upright)
        return [find_defects(face, min_width) for face in faces]

    def _detect_upright(self, image: Tensor) -> list[Face]:
        return [face for face in self.detector.detect([image]) if face is not None]
