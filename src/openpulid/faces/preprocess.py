"""What the vision tower sees of a face."""

from __future__ import annotations

from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def luminance(images: Tensor) -> Tensor:
    """(B, 3, H, W) colours to (B, 1, H, W) gray by the weights of ITU-R BT.601."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def gray_on_white(crop: Tensor, mask: Tensor) -> Tensor:
    """The kept pixels in gray on a white ground, so that neither colour nor surroundings reach the tower (PuLID, 3.1).

    Args:
        crop: (B, 3, H, W) in [0, 1].
        mask: (B, 1, H, W) in [0, 1], what is kept.

    Returns:
        (B, 3, H, W) in [0, 1], three equal channels, differentiable in the crop.
    """
    gray = 1 + (luminance(crop) - 1) * mask.to(crop)
    return gray.expand(-1, 3, -1, -1)
