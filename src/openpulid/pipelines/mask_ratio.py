"""The ratio of masks: those of people in a generated image, and that of inpainting."""

from __future__ import annotations

from PIL import Image, ImageOps

from openpulid.methods.hooks import MIN_RATIO_SIDE, warn_if_other_ratio


def crop_mask(mask: Image.Image, size: tuple[int, int], name: str = "mask") -> Image.Image:
    """Crop a mask evenly to the ratio of its image, so that its shapes are not stretched.

    A mask with a side of fewer than `MIN_RATIO_SIDE` pixels, such as one of 2 x 1 pixels for two
    halves, has no exact ratio and stays as it is.

    Args:
        mask: gray, of 8 bits (L) or floating point (F).
        size: width and height of its image in pixels: the generated image for the mask of a person,
            the initial image for that of inpainting.
        name: how messages call the mask.

    Returns:
        The middle of the mask, in its own pixels.
    """
    if min(mask.size) < MIN_RATIO_SIDE:
        return mask
    width, height = size
    warn_if_other_ratio(name, (mask.height, mask.width), (height, width), "cropped")
    scale = min(mask.width / width, mask.height / height)
    middle = (max(1, round(width * scale)), max(1, round(height * scale)))
    return ImageOps.fit(mask, middle, Image.Resampling.BOX)
