"""Face detection as identity extractors need it: on one image, with hints for error messages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from openpulid.faces.face import Face
from openpulid.faces.miniature import SIZE, MiniFaceDetector
from openpulid.faces.orientation import SAME_FACE, detect_in_all_orientations, overlap
from openpulid.faces.photo_detector import LONGEST, PhotoDetector, load_photo_detector
from openpulid.faces.quality import find_defects
from openpulid.io.checkpoints import load_module
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size

MAX_ASPECT = 16
"""Longer over shorter side of an image from which the miniature sees at most 6 pixels."""
MIN_FACE = 64
"""Smallest useful face in a photo, in pixels: face recognition reads it at 112, the vision encoder
at 336."""

MINI_MIN_FACE = 32
"""Smallest useful face of a synthetic person, in pixels of the image and of the detector's input.

The embedding of a face of 58 pixels that is reduced to 30 has a similarity of at least 0.93 to the
original, of 19 pixels 0.75, of 15 pixels 0.40."""


WINDOWS = (1.0, 1.4, 2.0, 2.8)
"""Shorter side of the image over that of the windows in which the miniature's detector looks for
small faces. It detects faces of 0.5 to 0.75 of its input: 32 of 32, and at 0.35 only 5 of 32."""
STRIDE = 0.25
"""Distance between windows as a share of their side."""

MIN_WINDOW = 60
"""Smallest window of a reference image in pixels: its faces have `MINI_MIN_FACE` or more."""


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

    def detect_all(self, image: Tensor) -> list[Face]:
        """Return all faces in a generated image (3, H, W) in [0, 1], also small ones."""


class PhotoFaceDetection:
    """Detects faces in photos with SCRFD or YuNet, the largest first."""

    max_image_size: int | None = LONGEST
    no_face_hint = "use an image in which one face is large, upright and seen from the front."

    def __init__(self, detector: PhotoDetector) -> None:
        self.detector = detector

    @classmethod
    def load(cls, path: str | PathLike[str], device: str | torch.device) -> PhotoFaceDetection:
        """Load the detector from its ONNX file.

        Raises:
            WeightsError: the file is missing or damaged.
        """
        return cls(load_photo_detector(path, device))

    @property
    def search_description(self) -> str:
        """What `detect` tries before it gives up."""
        return self.detector.search_description

    def detect(self, image: Tensor) -> list[Face]:
        """Return the faces in an image (3, H, W) in [0, 1], also a turned one; largest first."""
        return [find_defects(face, MIN_FACE) for face in self.detector.detect(image)]

    def detect_all(self, image: Tensor) -> list[Face]:
        """Return all faces in an image (3, H, W) in [0, 1]; largest first."""
        return self.detector.detect(image)


class MiniFaceDetection:
    """Detects the faces of the miniature's synthetic people."""

    max_image_size: int | None = None  # the detector resizes images itself
    no_face_hint = (
        "this preset only detects synthetic people (`pulid world person` draws one) whose face is "
        "about half as wide as the image; use a full-size preset for photos."
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
        return f"at {SIZE} pixels, in four orientations"

    def detect(self, image: Tensor) -> list[Face]:
        """Return the faces in an image (3, H, W) in [0, 1], the largest first.

        A single face may be turned.
        """
        if max(image.shape[1:]) > MAX_ASPECT * min(image.shape[1:]):
            return []  # the detector pads to a square, which may not fit into memory
        # the detector reads the whole image at its own size
        min_width = MINI_MIN_FACE * max(1, max(image.shape[1:]) / SIZE)
        faces = self._detect_in_windows(image, MIN_WINDOW)
        if len(faces) > 1:  # each was read in a window
            return [find_defects(face, MINI_MIN_FACE) for face in faces]
        faces = detect_in_all_orientations(image, self._detect_upright)
        return [find_defects(face, min_width) for face in faces]

    def detect_all(self, image: Tensor) -> list[Face]:
        """Return the upright faces in an image (3, H, W), also small ones; largest first."""
        return self._detect_in_windows(image)

    def _detect_in_windows(self, image: Tensor, min_side: int = 1) -> list[Face]:
        """Detect upright faces in windows of several sizes, since the detector sees one large face.

        Of faces that overlap, the one in the larger window is returned: a smaller one shows a part
        of a face.

        Args:
            image: (3, H, W) in [0, 1].
            min_side: of a window in pixels.
        """
        faces: list[Face] = []
        for ratio in WINDOWS:
            windows = [window for window in _windows(image, ratio) if window[2] >= min_side]
            crops = [image[:, y : y + side, x : x + side] for x, y, side in windows]
            detected = self.detector.detect(crops)
            moved = [
                _move(face, image, x, y)
                for face, (x, y, _) in zip(detected, windows, strict=True)
                if face is not None and not _is_cut(face, image, x, y)
            ]
            for face in sorted(moved, key=lambda face: -face.score):
                if not any(_is_same(face, other) for other in faces):
                    faces.append(face)
        return sorted(faces, key=lambda face: -face.area)

    def _detect_upright(self, image: Tensor) -> list[Face]:
        return [face for face in self.detector.detect([image]) if face is not None]


def _windows(image: Tensor, ratio: float) -> Iterator[tuple[int, int, int]]:
    """Yield left, top and side of square windows that cover an image (3, H, W)."""
    height, width = image.shape[1:]
    side = max(1, round(min(height, width) / ratio))
    for top in _starts(height, side):
        for left in _starts(width, side):
            yield left, top, side


def _starts(length: int, side: int) -> list[int]:
    """Return evenly spaced positions of windows on an axis, at most `STRIDE` sides apart."""
    count = math.ceil((length - side) / (STRIDE * side))
    return [round(k * (length - side) / max(1, count)) for k in range(count + 1)]


def _move(face: Face, image: Tensor, left: int, top: int) -> Face:
    """Convert a face in a window to pixels of the image."""
    offset = torch.tensor([left, top]).to(face.box)
    mask = face.mask
    if mask is not None:
        right = image.shape[2] - left - mask.shape[2]
        mask = pad(mask, (left, right, top, image.shape[1] - top - mask.shape[1]))
    return replace(
        face,
        image=image,
        box=face.box + offset.repeat(2),
        landmarks=face.landmarks + offset,
        mask=mask,
    )


def _is_cut(face: Face, image: Tensor, left: int, top: int) -> bool:
    """Whether a face reaches the border of its window, within the image."""
    (height, width), (rows, columns) = face.image.shape[1:], image.shape[1:]
    x1, y1, x2, y2 = face.box.tolist()
    return (
        (x1 <= 0 and left > 0)
        or (y1 <= 0 and top > 0)
        or (x2 >= width and left + width < columns)
        or (y2 >= height and top + height < rows)
    )


def _is_same(face: Face, other: Face) -> bool:
    """Whether a face is the same as one in a larger window, or a part of it."""
    center = (face.box[:2] + face.box[2:]) / 2
    is_inside = bool((center > other.box[:2]).all() and (center < other.box[2:]).all())
    return is_inside or overlap(face, other) > SAME_FACE


def detect_in_image(detection: FaceDetection, image: Image.Image) -> list[Face]:
    """Detect all faces of a generated image, in its own pixels and without masks."""
    reduced = image
    if detection.max_image_size is not None:
        reduced = limit_size(image, detection.max_image_size)
    scale = image.width / reduced.width
    pixels = to_tensor([image])[0]
    return [
        replace(
            face,
            image=pixels,
            box=face.box * scale,
            landmarks=face.landmarks * scale,
            mask=None,
        )
        for face in detection.detect_all(to_tensor([reduced])[0])
    ]
