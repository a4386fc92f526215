"""What makes the identity of a face uncertain: a small, blurred or tilted face."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from openpulid.faces.align import similarity_transform, warp_images
from openpulid.faces.arcface import ARCFACE_CROP, ARCFACE_TEMPLATE
from openpulid.faces.face import Defect, Face
from openpulid.faces.orientation import is_upright
from openpulid.io.image_grid import luminance

MIN_SHARPNESS = 0.01
"""Least `sharpness` of a sharp face.

The faces of nine photographs have 0.11 to 0.33, those of a group photo of six 0.06 to 0.12, and
synthetic people 0.07 to 0.29. A Gaussian blur of 2% of the face's width leaves at most 0.0104, of
3% at most 0.0034 and of 10% at most 0.0013; one of 1% at least 0.015."""

MIN_CONTRAST = 1e-5
"""Variance of the luminance, from 0 to 1, of an area of one color."""

MARGIN = ARCFACE_CROP // 8
"""Border of the crop in pixels that is ignored: it can be outside of the image."""

LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def find_defects(face: Face, min_width: float) -> Face:
    """Return the face with its defects.

    Args:
        face: a detected face; without usable landmarks it is returned as it is.
        min_width: smallest useful width in pixels.
    """
    if not face.has_usable_landmarks:
        return face
    defects: set[Defect] = set()
    if face.shorter_side < min_width:
        defects.add("small")  # enlarged, it is always blurred
    elif sharpness(face) < MIN_SHARPNESS:
        defects.add("blurred")
    if not is_upright(face):
        defects.add("tilted")
    return replace(face, defects=frozenset(defects))


def sharpness(face: Face) -> float:
    """Measure how sharp a face is, independent of its size, contrast and brightness.

    This is the variance of the Laplacian (Pech-Pacheco et al. 2000) over the variance of the
    luminance, in the crop that ArcFace reads. It is infinite without any contrast.
    """
    luma = luminance(_crop(face))[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
    contrast = float(luma.var())
    if contrast < MIN_CONTRAST:
        return math.inf
    kernel = torch.tensor(LAPLACIAN)[None, None]
    return float(conv2d(luma, kernel).var()) / contrast


def _crop(face: Face) -> Tensor:
    """Align a face to ArcFace's crop, (1, 3, 112, 112), averaging the pixels of a larger face."""
    template = ARCFACE_TEMPLATE + 0.5
    transform = similarity_transform(face.landmarks[None].float(), template)
    pixels = float(torch.linalg.vector_norm(transform[0, :, 0]))  # of the image per pixel of crop
    factor = min(max(1, math.ceil(pixels)), 8)
    size = ARCFACE_CROP * factor
    transform = similarity_transform(face.landmarks[None].float(), template * factor)
    crop = warp_images(face.image[None], transform, size)
    return interpolate(crop, size=(ARCFACE_CROP, ARCFACE_CROP), mode="area")
