"""Tell a control image that is ready, such as a depth map, from a plain image by its content."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from openpulid.errors import explain_missing_library

ControlKind = Literal["edges", "depth", "pose"]

MAX_CHROMA = 8.0
"""Mean difference of the color channels, of 255, of pixels in gray that are not black."""

DARK, BRIGHT = 48, 207
"""Values, of 255, up to which a pixel is black, and from which it is white."""

LINE_WIDTH = 0.02
"""Fraction of the shorter side from which a white area is no edge."""

LIMB_WIDTH = 0.06
"""Fraction of the shorter side from which a colored area is no limb of a pose."""

SMOOTH_SIDE = 512
"""Shorter side in pixels at which the texture of an image is measured."""


def is_control_map(kind: ControlKind, image: Image.Image) -> bool:
    """Return whether an image is a control image of a kind already.

    Edges are thin white lines on black, a depth map is gray without texture, and a pose is drawn
    in bright colors on black. `tests/methods/test_control_maps.py` measures the rules on photos and
    on maps of them. They can fail: a gray photo without texture is taken for a depth map.

    Args:
        kind: what the map would show.
        image: RGB.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    brightness = pixels.max(-1)
    chroma = brightness - pixels.min(-1)
    if kind == "pose":
        return _is_pose(brightness, chroma)
    is_lit = brightness > DARK
    if is_lit.any() and chroma[is_lit].mean() > MAX_CHROMA:
        return False
    is_lines = _is_lines(image.convert("L"))
    return is_lines if kind == "edges" else not is_lines and _is_smooth(image.convert("L"))


def _is_pose(brightness: np.ndarray, chroma: np.ndarray) -> bool:
    """Return whether an image is black, with thin lines in bright colors."""
    is_lit = brightness >= 96
    if (brightness < DARK).mean() < 0.6 or is_lit.mean() < 0.0005:
        return False
    saturation = chroma[is_lit] / brightness[is_lit]
    return (saturation > 0.6).mean() > 0.8 and _is_thin(is_lit, LIMB_WIDTH)


def _is_lines(gray: Image.Image) -> bool:
    """Return whether an image is black, with thin white lines."""
    values = np.asarray(gray)
    is_white = values > BRIGHT
    is_between = (values > DARK) & ~is_white
    if not 0.001 < (values > DARK).mean() < 0.4 or is_between.mean() > 0.15:
        return False
    return _is_thin(values > DARK, LINE_WIDTH)


def _is_thin(mask: np.ndarray, width: float) -> bool:
    """Return whether little is left of an area (H, W) after its borders are taken off.

    Args:
        mask: the area.
        width: of a line, as a fraction of the shorter side.
    """
    with explain_missing_library():
        import cv2

    side = int(width * min(mask.shape)) + 3
    solid = cv2.erode(mask.astype(np.uint8), np.ones((side, side), np.uint8))
    return bool(solid.sum() < 0.1 * mask.sum())


def _is_smooth(gray: Image.Image) -> bool:
    """Return whether an image has areas of different brightness, and no texture."""
    scale = SMOOTH_SIDE / min(gray.size)
    size = (max(1, round(gray.width * scale)), max(1, round(gray.height * scale)))
    small = gray.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    values = np.asarray(small).astype(np.float32)
    smoothed = np.asarray(small.filter(ImageFilter.MedianFilter(5))).astype(np.float32)
    return bool(values.std() > 8 and (abs(values - smoothed) > 2).mean() < 0.05)
