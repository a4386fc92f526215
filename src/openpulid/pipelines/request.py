"""What one generation needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from openpulid import __version__
from openpulid.errors import OptionError

if TYPE_CHECKING:
    from PIL import Image

    from openpulid.pipelines.studio import GenerationResult

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def parse_size(text: str | None, multiple: int = 8) -> tuple[int, int] | None:
    """WIDTHxHEIGHT as two numbers, each a multiple: of 16 for FLUX."""
    if text is None:
        return None
    if (
        not (match := re.fullmatch(r"(\d+)[x×](\d+)", text))
        or min(found := tuple(map(int, match.groups()))) < multiple
    ):
        raise OptionError(f"{text!r} is no size; write WIDTHxHEIGHT, such as 832x1216.")
    width, height = found
    if width % multiple or height % multiple:
        near = f"{width // multiple * multiple}x{height // multiple * multiple}"
        raise OptionError(f"{text}: width and height are multiples of {multiple}, such as {near}.")
    return width, height


def request_of(
    request: Mapping[str, Any], result: GenerationResult, image: Image.Image, seed: int
) -> dict[str, Any]:
    """A request with all that one of its images was made with, for `save_picture`: a preset's defaults may change."""
    from openpulid.pipelines.presets import options_of

    preset = result.preset
    made = {
        **options_of(preset),
        "size": "{}x{}".format(*image.size),
        "seed": seed,
        "version": __version__,
    }
    return {**request, **made, "memory": preset.memory if preset.family == "flux" else None}
