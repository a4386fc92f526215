"""Sizes of images that suit a preset."""

from __future__ import annotations

from openpulid.errors import OptionError
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.request import parse_size

RATIOS = (
    ("Square", 1, 1),
    ("Portrait 4:5", 4, 5),
    ("Portrait 2:3", 2, 3),
    ("Portrait 9:16", 9, 16),
    ("Landscape 5:4", 5, 4),
    ("Landscape 3:2", 3, 2),
    ("Landscape 16:9", 16, 9),
)


def list_sizes(preset: Preset) -> list[tuple[str, str]]:
    """Return label and value of sizes with about as many pixels as in the training.

    The value is WIDTHxHEIGHT.
    """
    models = preset.models
    sizes: dict[str, str] = {}
    for name, width, height in RATIOS:
        scale = models.native_side / (width * height) ** 0.5
        sides = [
            round(side * scale / models.size_multiple) * models.size_multiple
            for side in (width, height)
        ]
        if all(models.min_side <= side <= models.max_side for side in sides):
            size = "x".join(map(str, sides))
            sizes.setdefault(size, f"{name}: {sides[0]} x {sides[1]}")
    return [(label, size) for size, label in sizes.items()]


def canvas_size(size: str | None, longest: int = 512) -> tuple[int, int]:
    """Return width and height of a canvas to draw on, with the ratio of a size.

    Args:
        size: WIDTHxHEIGHT; a square for None and "".
        longest: longer side of the canvas in pixels.
    """
    try:
        width, height = parse_size(size or "1x1")
    except OptionError:  # reported when the image is generated
        width = height = 1
    scale = longest / max(width, height, 1)
    return max(round(width * scale), 1), max(round(height * scale), 1)
