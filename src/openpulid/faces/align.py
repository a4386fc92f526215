"""Putting faces where a recogniser expects them: similarity transforms from five landmarks, and differentiable crops.

Coordinates are continuous: pixel k covers [k, k + 1), its centre is k + 0.5, and a crop of size s covers [0, s).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

TEMPLATE = torch.tensor(
    [[0.340, 0.355], [0.660, 0.355], [0.500, 0.535], [0.385, 0.640], [0.615, 0.640]]
)
"""(5, 2) where the landmarks of a frontal face lie in a crop, in the unit square; the whole face fits around them."""

GRAY = 0.5
"""What everything that is not face becomes before a recogniser sees it."""


def similarity_transform(landmarks: Tensor, template: Tensor) -> Tensor:
    """The rotation, scale and shift that take the template closest to the landmarks, in least squares.

    Closed form of Umeyama (1991) for two dimensions without reflection.

    Args:
        landmarks: (B, 5, 2) in pixels of the image.
        template: (5, 2) in pixels of the crop, usually ``TEMPLATE * size``.

    Returns:
        (B, 2, 3) matrices from crop pixels to image pixels, as `warp` takes them.
    """
    template = template.to(landmarks)
    target_mean, source_mean = landmarks.mean(1), template.mean(0)  # (B, 2), (2,)
    target, source = landmarks - target_mean[:, None], template - source_mean
    power = source.square().sum()
    cos = (target * source).sum((1, 2)) / power
    sin = (target[..., 1] * source[:, 0] - target[..., 0] * source[:, 1]).sum(1) / power
    rotation = torch.stack(
        [torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1
    )  # (B, 2, 2)
    # sums of products, not matmul: under autocast a matrix product would round coordinates to eight bits
    shift = target_mean - (rotation * source_mean).sum(-1)
    return torch.cat([rotation, shift[..., None]], -1)


def warp_images(images: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Bilinear crops, differentiable in the images; what lies outside the image is zero.

    Args:
        images: (B, C, H, W) float.
        matrix: (B, 2, 3) from crop pixels to image pixels.
        size: width and height of the crops.

    Returns:
        (B, C, size, size) float32.
    """
    height, width = images.shape[-2:]
    centres = torch.arange(size, device=images.device, dtype=matrix.dtype) + 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    columns = matrix[:, None, None].unbind(
        -1
    )  # what x, y and 1 are multiplied with: three of (B, 1, 1, 2)
    points = (
        x[..., None] * columns[0] + y[..., None] * columns[1] + columns[2]
    )  # (B, size, size, 2)
    grid = (
        points * torch.tensor([2 / width, 2 / height], device=matrix.device, dtype=matrix.dtype) - 1
    )
    return grid_sample(images.float(), grid.float(), align_corners=False)


def align_faces(images: Tensor, masks: Tensor, landmarks: Tensor, size: int) -> Tensor:
    """Crops with the face in the template's place and everything outside the mask gray: no hair reaches a recogniser.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        masks: (B, 1, H, W) in [0, 1], the faces' own pixels.
        landmarks: (B, 5, 2) in pixels of the images.

    Returns:
        (B, 3, size, size) in [0, 1], differentiable in the images.
    """
    crops = warp_images(
        torch.cat([images, masks.to(images)], 1),
        similarity_transform(landmarks, TEMPLATE * size),
        size,
    )
    return mask_background(crops[:, :3], crops[:, 3:])


def mask_background(crops: Tensor, masks: Tensor) -> Tensor:
    """`crops` (B, 3, S, S) with everything outside `masks` (B, 1, S, S) in `GRAY`."""
    return GRAY + (crops - GRAY) * masks
