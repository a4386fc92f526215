"""Face alignment: similarity transforms from five landmarks, differentiable crops, gray faces.

Coordinates are continuous: pixel k covers [k, k + 1), its center is k + 0.5, and a crop of size s
covers [0, s).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from openpulid.io.image_grid import luminance

TEMPLATE = torch.tensor(
    [[0.340, 0.355], [0.660, 0.355], [0.500, 0.535], [0.385, 0.640], [0.615, 0.640]]
)
"""(5, 2) landmarks of a frontal face in the unit square of a crop; the complete face is inside."""

GRAY = 0.5
"""Value of all pixels outside of the face in the input of a face recognition model."""

WHITE = 1.0
"""Value of all pixels outside of the face in the input of a vision or face latent encoder."""


def similarity_transform(landmarks: Tensor, template: Tensor) -> Tensor:
    """Fit the rotation, scale and shift that map the template to the landmarks, in least squares.

    Closed form of Umeyama (1991) for two dimensions without reflection.

    Args:
        landmarks: (B, 5, 2) in pixels of the image.
        template: (5, 2) in pixels of the crop, usually ``TEMPLATE * size``.

    Returns:
        (B, 2, 3) matrices from crop pixels to image pixels, as `warp_images` takes them.
    """
    template = template.to(landmarks)
    target_mean = landmarks.mean(1)  # (B, 2)
    source_mean = template.mean(0)  # (2,)
    target = landmarks - target_mean[:, None]
    source = template - source_mean
    power = source.square().sum()
    cos = (target * source).sum((1, 2)) / power
    sin = (target[..., 1] * source[:, 0] - target[..., 0] * source[:, 1]).sum(1) / power
    rotation = torch.stack(
        [torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1
    )  # (B, 2, 2)
    # Sums of products instead of matmul: autocast would round the coordinates to eight bits.
    shift = target_mean - (rotation * source_mean).sum(-1)
    return torch.cat([rotation, shift[..., None]], -1)


def compose_affine(matrix: Tensor, first: Tensor) -> Tensor:
    """Compose `matrix` (B, 2, 3) after `first` (B, 3, 3).

    Sums of products instead of matmul, which autocast would round.
    """
    return (matrix[..., None] * first.to(matrix)[:, None]).sum(2)


def turn_points(points: Tensor, turns: int, size: tuple[int, int]) -> Tensor:
    """Turn points together with their image, as `torch.rot90(image, turns, (1, 2))` does.

    Args:
        points: (N, 2) in pixels of the image.
        turns: number of quarter turns, counterclockwise; negative ones are clockwise.
        size: width and height of the image before the turn.

    Returns:
        (N, 2) in pixels of the turned image.
    """
    width, height = size
    x, y = points.unbind(1)
    turned = [(x, y), (y, width - x), (width - x, height - y), (height - y, x)]
    return torch.stack(turned[turns % 4], 1)


def warp_images(images: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Crop images bilinearly, differentiable in the images; pixels outside of the image are zero.

    Args:
        images: (B, C, H, W) float.
        matrix: (B, 2, 3) from crop pixels to image pixels.
        size: width and height of the crops.

    Returns:
        (B, C, size, size) float32.
    """
    height, width = images.shape[-2:]
    centers = torch.arange(size, device=images.device, dtype=matrix.dtype) + 0.5
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    # The matrix columns that multiply x, y and 1: three tensors (B, 1, 1, 2).
    column_x, column_y, column_1 = matrix[:, None, None].unbind(-1)
    points = x[..., None] * column_x + y[..., None] * column_y + column_1  # (B, size, size, 2)
    scale = torch.tensor([2 / width, 2 / height], device=matrix.device, dtype=matrix.dtype)
    grid = points * scale - 1
    return grid_sample(images.float(), grid.float(), align_corners=False)


def crop_faces(
    images: Tensor,
    masks: Tensor,
    landmarks: Tensor,
    size: int,
    jitter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Align faces and their masks, differentiable in the images.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        masks: (B, 1, H, W) in [0, 1], one on the pixels of the face.
        landmarks: (B, 5, 2) in pixels of the images.
        size: width and height of the crops, S.
        jitter: (B, 3, 3) of `augment.random_affine`, a transform of the crops in training.

    Returns:
        (B, 3, S, S) images and (B, 1, S, S) masks.
    """
    matrix = similarity_transform(landmarks, TEMPLATE * size)
    if jitter is not None:
        matrix = compose_affine(matrix, jitter)
    crops = warp_images(torch.cat([images, masks.to(images)], 1), matrix, size)
    return crops[:, :3], crops[:, 3:]


def align_faces(images: Tensor, masks: Tensor, landmarks: Tensor, size: int) -> Tensor:
    """Crop faces to the template, with everything outside of the mask gray.

    No hair reaches the face recognition model.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        masks: (B, 1, H, W) in [0, 1], one on the pixels of the face.
        landmarks: (B, 5, 2) in pixels of the images.
        size: width and height of the crops.

    Returns:
        (B, 3, size, size) in [0, 1], differentiable in the images.
    """
    return replace_background(*crop_faces(images, masks, landmarks, size), GRAY)


def replace_background(crops: Tensor, masks: Tensor, value: float) -> Tensor:
    """Set everything outside of `masks` (B, 1, S, S) in `crops` (B, C, S, S) to `value`."""
    return value + (crops - value) * masks


def gray_on_white(crop: Tensor, mask: Tensor) -> Tensor:
    """Convert the pixels inside of the mask to gray and all other pixels to white.

    Neither color nor surroundings reach the vision encoder (PuLID, section 3.1).

    Args:
        crop: (B, 3, H, W) in [0, 1].
        mask: (B, 1, H, W) in [0, 1], 1 on the pixels to keep.

    Returns:
        (B, 3, H, W) in [0, 1], three equal channels, differentiable in the crop.
    """
    gray = replace_background(luminance(crop), mask.to(crop), WHITE)
    return gray.expand(-1, 3, -1, -1)
