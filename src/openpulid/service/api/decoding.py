"""Decode uploaded images in a child process, under the limits of the service."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageChops

from openpulid.io.decoding import MIN_SIDE
from openpulid.io.images import open_image, open_mask
from openpulid.io.metadata import encode_image
from openpulid.service.config import Limits

TRANSPARENT = 128
"""From here on a pixel of a mask is transparent: half of an 8-bit level."""


def decode_image(
    content: bytes, field: str, limits: Limits, min_side: int = MIN_SIDE
) -> Image.Image:
    """Decode an image as `open_image` does.

    Args:
        content: of its file.
        field: names it in messages.
        limits: of the service.
        min_side: minimum of width and height in pixels.

    Raises:
        ImageError: it cannot be decoded.
    """
    return open_image(content, min_side=min_side, **_options(field, limits))


def decode_mask(content: bytes, field: str, limits: Limits) -> Image.Image:
    """Decode a mask as `open_mask` does. Raises as `decode_image`."""
    return open_mask(content, **_options(field, limits))


def _options(field: str, limits: Limits) -> dict[str, Any]:
    """Return the arguments of `open_image` and `open_mask` for an uploaded file."""
    return {
        "name": field,
        "max_bytes": limits.file_bytes,
        "max_pixels": limits.pixels,
        "time_limit": limits.decode_seconds,
    }


def convert_mask(content: bytes, field: str, limits: Limits) -> bytes:
    """Turn a mask in OpenAI's convention, transparent where to edit, into one that is white there.

    A mask without transparent pixels is white there already.

    Args:
        content: of an image file.
        field: for messages.
        limits: of the file.

    Returns:
        The content of a PNG file.

    Raises:
        ImageError: it cannot be decoded.
    """
    # a pixel of opacity a is shown on white by one of the two, and on black by the other
    on_black = decode_mask(content, field, limits)
    on_white = decode_image(content, field, limits, min_side=1).convert("L")
    transparency = ImageChops.subtract(on_white, on_black)
    is_transparent = bool(np.asarray(transparency).max() >= TRANSPARENT)
    return encode_image(transparency if is_transparent else on_black, source_type=None)
