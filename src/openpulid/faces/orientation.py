"""Faces in images that are turned by a quarter or a half, as by a camera that writes no EXIF.

A detector reports a face on its side with inaccurate landmarks, and a face that is upside down as
an upright one or not at all. Both are detected in turned copies of the image instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openpulid.faces.align import turn_points
from openpulid.faces.face import Face

MAX_ROLL = 45.0
"""Tilt in degrees from which a face is also detected in turned copies."""

WORST_ROLL = 60.0
"""Tilt in degrees from which landmarks are wrong, whatever the score."""

MIN_DISTANCE = 0.05
"""Distance from eyes to mouth, as a share of the face's width, that still has a direction."""

CLEAR_SCORE = 0.7
"""Score from which an upright face is one.

SCRFD gives the upright faces of eight photographs at least 0.79, and at most 0.66 when they are
upside down but reported as upright."""

SAME_FACE = 0.25
"""Overlap (intersection over union) from which two boxes are those of one face.

The box of a face on its side can be twice as long as that of the same face upright."""

Detect = Callable[[Tensor], Sequence[Face]]


def detect_in_all_orientations(
    image: Tensor, detect: Detect, clear_score: float = CLEAR_SCORE
) -> list[Face]:
    """Detect faces in an image, and in turned copies unless all its faces are upright and clear.

    Args:
        image: (3, H, W) float in [0, 1].
        detect: returns the faces of an image, the largest first.
        clear_score: score from which this detector's upright faces are clear.

    Returns:
        Faces in pixels of `image`, the largest first; `Face.turns` says how each was detected.
    """
    faces = list(detect(image))
    if faces and faces[0].score >= clear_score and all(map(is_upright, faces)):
        return faces
    for turns in (1, 2, 3):
        copy = torch.rot90(image, turns, (1, 2)).contiguous()
        for face in detect(copy):
            faces = _merge(faces, turn_back(face, image, turns), clear_score)
    return sorted(faces, key=lambda face: -face.area)


def roll(face: Face) -> float:
    """Return the tilt of a face in degrees, from -180 to 180, as it was detected.

    It is the angle between the line from eyes to mouth and the vertical; 0 if they are at one
    point.
    """
    size = (face.image.shape[2], face.image.shape[1])
    landmarks = turn_points(face.landmarks, face.turns, size)
    x, y = (landmarks[3:].mean(0) - landmarks[:2].mean(0)).tolist()
    if math.hypot(x, y) < MIN_DISTANCE * face.shorter_side:
        return 0.0
    return math.degrees(math.atan2(-x, y))


def is_upright(face: Face) -> bool:
    """Return whether a face is tilted by at most `MAX_ROLL`."""
    return abs(roll(face)) <= MAX_ROLL


def turn_back(face: Face, image: Tensor, turns: int) -> Face:
    """Convert a face of a turned copy to pixels of the image.

    Args:
        face: a face of `torch.rot90(image, turns, (1, 2))`.
        image: (3, H, W).
        turns: number of quarter turns of the copy, counterclockwise.
    """
    size = (face.image.shape[2], face.image.shape[1])
    corners = turn_points(face.box.reshape(2, 2), -turns, size)
    return replace(
        face,
        image=image,
        box=torch.cat([corners.amin(0), corners.amax(0)]),
        landmarks=turn_points(face.landmarks, -turns, size),
        mask=None if face.mask is None else torch.rot90(face.mask, -turns, (1, 2)),
        turns=turns,
    )


def overlap(a: Face, b: Face) -> float:
    """Return the intersection of two boxes over their union."""
    top_left = torch.maximum(a.box[:2], b.box[:2])
    bottom_right = torch.minimum(a.box[2:], b.box[2:])
    intersection = float((bottom_right - top_left).clamp(min=0).prod())
    return intersection / max(a.area + b.area - intersection, 1e-6)


def _merge(faces: Sequence[Face], candidate: Face, clear_score: float) -> list[Face]:
    """Add a face of a turned copy, unless the same face has a better detection.

    Copies show patterns that look like faces: what is no face in the image must be clear.
    """
    rank = _rank(candidate)
    rivals = [face for face in faces if overlap(face, candidate) > SAME_FACE]
    if any(_rank(rival) >= rank for rival in rivals) or (
        not rivals and not (candidate.score >= clear_score and is_upright(candidate))
    ):
        return list(faces)
    return [*(face for face in faces if face not in rivals), candidate]


def _rank(face: Face) -> float:
    """Return the score, less up to a tenth for an upright face's tilt, and less 1 for a wrong one.

    Detectors prefer upright faces, but not enough: they also report them where there are none.
    """
    tilt = abs(roll(face))
    return face.score - 0.1 * tilt / MAX_ROLL - (tilt > WORST_ROLL)
