"""Search for faces at several sizes: detectors miss a face that fills the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from openpulid.faces.align import GRAY
from openpulid.faces.face import Face
from openpulid.faces.orientation import CLEAR_SCORE, SAME_FACE, overlap

INPUT = 640
"""Width and height of the input of the detectors in pixels."""

BORDERS = (0.0, 0.5, 1.5)
"""Widths of a border around the image as shares of its longer side, in the order of the attempts.

A face that fills the image is only detected at a smaller size and with space around it. With these
borders, the image has 640, 320 and 160 pixels of the input."""

CLOSE_UP = 0.4
"""Share of the longer side of an image from which no larger face can be missed at full size.

SCRFD detects faces of two thirds of the image and misses some of five sixths."""

SEARCH_DESCRIPTION = "three sizes, in four orientations"
"""What the detectors for photos try, in words."""

DetectOnce = Callable[[Tensor], list[Face]]
"""Runs a detector once on an image (3, H, W), which it shrinks to `INPUT`."""


def detect_at_all_sizes(
    image: Tensor, detect_once: DetectOnce, clear_score: float = CLEAR_SCORE
) -> list[Face]:
    """Detect all faces in an image that is known to be upright.

    A face that is larger than those detected at full size is looked for with a border: a
    close-up is easily missed next to small faces. Without a border, the result is that of
    `detect_once`.

    Args:
        image: (3, H, W) float in [0, 1].
        detect_once: the detector.
        clear_score: score from which its faces are clear.

    Returns:
        Faces, the largest first; an empty list without a face.
    """
    faces: list[Face] = []
    for border in BORDERS:
        smaller = _detect_with_border(image, border, detect_once)
        faces = _merge(faces, smaller, clear_score)
        is_second_look = border > 0
        if faces and (is_second_look or _is_clear_close_up(faces[0], clear_score)):
            break
    return faces


def _detect_with_border(image: Tensor, border: float, detect_once: DetectOnce) -> list[Face]:
    """Detect faces at the size that a border leaves for the image, in pixels of `image`."""
    height, width = image.shape[1:]
    if not border:
        is_line = INPUT * min(height, width) < max(height, width)  # under a pixel in the input
        return [] if is_line else detect_once(image)
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
    for face in detect_once(padded):
        corners = (face.box.reshape(2, 2) - offset) * pixels
        box = torch.minimum(corners.clamp(min=0), limits).flatten()
        landmarks = (face.landmarks - offset) * pixels
        faces.append(replace(face, image=image, box=box, landmarks=landmarks))
    return faces


def _merge(faces: Sequence[Face], smaller: Sequence[Face], clear_score: float) -> list[Face]:
    """Add what is detected at a smaller size: larger faces, and clearer detections of a face."""
    largest = faces[0].area if faces else 0
    merged = list(faces)
    for face in smaller:
        rivals = [rival for rival in merged if overlap(face, rival) > SAME_FACE]
        is_clearer = all(rival.score < min(face.score, clear_score) for rival in rivals)
        if is_clearer if rivals else face.area > largest:
            merged = [*(rival for rival in merged if rival not in rivals), face]
    return sorted(merged, key=lambda face: -face.area)


def _is_clear_close_up(face: Face, clear_score: float) -> bool:
    """Return whether a face is clear, and so large that there is no space for a larger one."""
    sides = face.box[2:] - face.box[:2]
    is_close_up = float(sides.max()) >= CLOSE_UP * max(face.image.shape[1:])
    return is_close_up and face.score >= clear_score
