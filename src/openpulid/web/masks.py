"""Masks that are painted on the page, each in one color."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openpulid.io.files import write_bytes
from openpulid.io.images import open_image
from openpulid.io.metadata import encode_image

Color = tuple[int, int, int]

PAINT: Color = (236, 72, 153)
"""Color of the area that is repainted."""

COLORS: tuple[Color, ...] = ((220, 38, 38), (37, 99, 235), (22, 163, 74), (217, 119, 6))
"""Color of the region of each person."""
COLOR_NAMES = ("red", "blue", "green", "orange")

PAINTED_FILE = "mask-{}.png"
"""The name of a painted area, with the number of its color."""

DECODE_SECONDS = 20.0
"""Time limit for decoding an upload, in a child process."""


def hex_color(color: Color) -> str:
    """Return a color as HTML writes it."""
    return "#" + bytes(color).hex()


def split_colors(
    canvas: Mapping[str, Any] | None,
    colors: Sequence[Color],
    directory: Path,
    name: str = PAINTED_FILE,
) -> list[str | None]:
    """Write a mask for each color that was used on a canvas.

    Args:
        canvas: the value of an image editor, whose layers are files.
        colors: the colors of the brush.
        directory: where the masks are written.
        name: of the files, with a place for their number.

    Returns:
        For each color a file that is white where the color is and black elsewhere, or None.

    Raises:
        ImageError: a layer is not an image.
    """
    masks: list[str | None] = [None] * len(colors)
    layers = (canvas or {}).get("layers") or []
    if not layers:
        return masks
    # transparent pixels are white
    painted = np.array(open_image(layers[0], min_side=1, time_limit=DECODE_SECONDS), np.int32)
    paint = 255 - painted
    # the edge of a stroke is its color mixed with white
    inks = [255 - np.array(color) for color in colors]
    shares = np.stack([paint @ ink / (ink @ ink) for ink in inks])
    errors = [
        ((paint - share[..., None] * ink) ** 2).sum(2)
        for share, ink in zip(shares, inks, strict=True)
    ]
    nearest = np.argmin(errors, 0)
    for number in range(len(colors)):
        area = (nearest == number) & (shares[number] > 0.5)
        if area.any():
            # drawn by a person, not generated
            image = encode_image(Image.fromarray(area.astype(np.uint8) * 255), source_type=None)
            file = directory / name.format(number + 1)
            masks[number] = str(write_bytes(file, image, private=True))
    return masks
