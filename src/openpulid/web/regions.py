"""Where each of several people is: a choice on the page, a drawing, a mask file, or a box."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.request_fields import RequestError, quote, split_box
from openpulid.pipelines.request_inputs import Person
from openpulid.web.masks import COLOR_NAMES, COLORS, split_colors

MAX_PEOPLE = 4
"""People of the tab Several people. A request can have more."""

PERSON_PREFIXES = tuple(f"person{number}_" for number in range(1, MAX_PEOPLE + 1))
"""Of the names of the components of each person."""

PERSON_COLORS = COLOR_NAMES
"""The color in which the region of each person is drawn."""

SIDE_BY_SIDE = "side by side"
"""The region of a person that depends on how many people there are."""
DRAWN = "drawn below"
"""The region that is painted in the color of the person."""
MASK_FILE = "a mask file"
"""The region that is white in an uploaded image."""
REGIONS = {
    "left half": (0.0, 0.0, 0.5, 1.0),
    "right half": (0.5, 0.0, 1.0, 1.0),
    "upper half": (0.0, 0.0, 1.0, 0.5),
    "lower half": (0.0, 0.5, 1.0, 1.0),
}
"""Boxes by name, as fractions of the image's sides."""

REGION_CHOICES = [SIDE_BY_SIDE, *REGIONS, DRAWN, MASK_FILE]

REGION_FILE = "region-{}.png"
"""The name of a drawn region, with the number of the person."""


def describe_group(models: ModelSet) -> str:
    """Return a sentence on how a method shows several people."""
    if models.supports_masks:
        return "Two to four people, each in their own region. The prompt describes the image."
    if models.shows_people_by_words:
        return (
            "Two to four people. The prompt has a word for each of them, in this order, such as "
            "*a man and a woman*."
        )
    return f"{models.method} shows one person in an image. Choose another method for several."


def side_by_side(position: int, count: int) -> tuple[float, float, float, float]:
    """Return the box of one of several people of equal width, counted from the left."""
    return (position / count, 0.0, (position + 1) / count, 1.0)


def save_drawing(canvas: Mapping[str, Any] | None, directory: Path) -> list[str | None]:
    """Write the drawn region of each person as a mask.

    Args:
        canvas: the value of the image editor.
        directory: where the masks are written.

    Returns:
        For each color a file, or None.

    Raises:
        ImageError: the drawing is not an image.
    """
    return split_colors(canvas, COLORS, directory, REGION_FILE)


def describe_regions(
    values: Mapping[str, Any], prefixes: Sequence[str], directory: Path
) -> list[dict[str, Any]]:
    """Return the region of each of several people, as a part of a request.

    Args:
        values: name of a component -> its value.
        prefixes: of the people with images or an identity file.
        directory: where the masks of drawn regions are written.

    Raises:
        RequestError: a region is missing, or no region.
    """
    regions = [_read_choice(values, prefix) for prefix in prefixes]
    drawn: list[str | None] = []
    if DRAWN in regions:
        drawn = save_drawing(values.get("regions"), directory)
    parts: list[dict[str, Any]] = []
    for position, (prefix, region) in enumerate(zip(prefixes, regions, strict=True)):
        if region == SIDE_BY_SIDE:
            count = len(prefixes)
            parts.append({"box": side_by_side(position, count)} if count > 1 else {})
        elif region == DRAWN:
            parts.append({"mask": _find_drawn(drawn, prefix, position)})
        elif region == MASK_FILE:
            parts.append({"mask": _find_mask(values, prefix, position)})
        else:
            parts.append({"box": REGIONS.get(region) or _parse_box(region, position)})
    return parts


def _read_choice(values: Mapping[str, Any], prefix: str) -> str:
    return (values.get(prefix + "region") or "").strip() or SIDE_BY_SIDE


def _find_drawn(drawn: Sequence[str | None], prefix: str, position: int) -> str:
    number = PERSON_PREFIXES.index(prefix)
    mask = drawn[number]
    if mask is None:
        raise RequestError(
            f"{{0}} of person {number + 1} is not drawn yet; draw it below in "
            f"{PERSON_COLORS[number]}, or choose another region.",
            f"people.{position}.mask",
        )
    return mask


def _find_mask(values: Mapping[str, Any], prefix: str, position: int) -> Any:
    mask = values.get(prefix + "mask")
    if not mask:
        raise RequestError(
            f"{{0}} of person {PERSON_PREFIXES.index(prefix) + 1} is {MASK_FILE}, and there is "
            "none; add the file, or choose another region.",
            f"people.{position}.mask",
        )
    return mask


def _parse_box(region: str, position: int) -> list[str]:
    box = split_box(region)
    if box is None:
        raise RequestError(
            "{0} must be one of the list, or a box LEFT,TOP,RIGHT,BOTTOM in fractions of the "
            f"image, such as 0,0,0.5,1, got {quote(region)}.",
            f"people.{position}.box",
        )
    return box


def read_region(person: Person, position: int, count: int) -> str:
    """Return the choice on the page for the region of a person.

    Args:
        person: of the request of an image.
        position: of the person, from 0.
        count: number of people.
    """
    if person.mask is not None:
        return DRAWN if is_drawn(person.mask) else MASK_FILE
    if person.box is None or (count > 1 and person.box == side_by_side(position, count)):
        return SIDE_BY_SIDE
    for name, box in REGIONS.items():
        if person.box == box:
            return name
    return ",".join(str(side).removesuffix(".0") for side in person.box)


def is_drawn(mask: str) -> bool:
    """Whether the mask of a person has been drawn on a page."""
    return re.fullmatch(REGION_FILE.format("[0-9]"), mask) is not None
