"""The pose of a head from five landmarks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from openpulid.faces.arcface import ARCFACE_TEMPLATE

NOSE_LENGTH = 0.36
"""How far the tip of the nose is in front of the plane of eyes and mouth, in distances between the
eyes: 22.5 of 63 mm."""


class HeadPose(NamedTuple):
    """Rotation of a head in degrees; a head that looks into the camera has zeros.

    Attributes:
        yaw: positive if the person looks to the right of the image.
        pitch: positive if the person looks up.
        roll: positive if the head is turned clockwise.
    """

    yaw: float
    pitch: float
    roll: float


def estimate_head_pose(landmarks: Tensor) -> HeadPose:
    """Estimate how a head is turned, from the position of the nose between eyes and mouth.

    The proportions are those of ArcFace's template, without perspective. Width and height of the
    face are not compared: people differ more in their ratio than a moderate turn changes it.

    Args:
        landmarks: (5, 2) left eye, right eye, nose tip, left and right mouth corner, in pixels.

    Returns:
        The pose. All angles are NaN if the landmarks do not extend in two directions.
    """
    points = landmarks.double()
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    right, down = points[1] - points[0] + points[4] - points[3], mouth - eyes
    # without roll, `right` is horizontal and `down` vertical
    roll = math.atan2(float(right[1] - down[0]), float(right[0] + down[1]))
    cos, sin = math.cos(roll), math.sin(roll)
    upright = points @ torch.tensor([[cos, -sin], [sin, cos]], dtype=points.dtype)

    width, height, nose_x, nose_y = _measure(upright)
    front_width, front_height, _, front_nose_y = _measure(ARCFACE_TEMPLATE.double())
    # a turned head is narrower or lower: the other side gives the scale
    scale = max(width / front_width, height / front_height)
    depth = NOSE_LENGTH * front_width * scale
    if not (depth > 0 and width > 0 and height > 0):
        return HeadPose(math.nan, math.nan, math.nan)
    lowered = nose_y - front_nose_y / front_height * height
    return HeadPose(_arcsine(nose_x / depth), _arcsine(-lowered / depth), math.degrees(roll))


def _measure(points: Tensor) -> tuple[float, float, float, float]:
    """Return the distances between the eyes and from eyes to mouth, and where the nose is.

    Args:
        points: (5, 2) landmarks of an upright face.

    Returns:
        Width, height, the nose's x relative to the middle of the face, its y relative to the eyes.
    """
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    size = (float(points[1, 0] - points[0, 0]), float(mouth[1] - eyes[1]))
    nose = points[2] - torch.stack([(eyes[0] + mouth[0]) / 2, eyes[1]])
    return *size, float(nose[0]), float(nose[1])


def _arcsine(value: float) -> float:
    return math.degrees(math.asin(min(max(value, -1), 1)))
