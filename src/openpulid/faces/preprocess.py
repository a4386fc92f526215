"""Preprocessing of face crops for the vision encoder."""

from __future__ import annotations

from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def luminance(images: Tensor) -> Tensor:
    """Convert RGB images (B, 3, H, W) to gray (B, 1, H, W) with the weights of ITU-R BT.601."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def gray_on_white(crop: Tensor, mask: Tensor) -> Tensor:
    """Convert the pixels inside of the mask to gray and all other pixels to white.

    Neither color nor surroundings reach the vision encoder (PuLID, section 3.1).

    Args:
        crop: (B, 3, H, W) in [0, 1].
        mask: (B, 1, H, W) in [0, 1], 1 on the pixels to keep.

    Returns:
        (B, 3, H, W) in [0, 1], three equal channels, differentiable in the crop.
    """
    gray = 1 + (luminance(crop) - 1) * mask.to(crop)
    return gray.expand(-1, 3, -1, -1)
