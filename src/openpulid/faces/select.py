"""Which face, when a picture shows several: one is chosen, once, and everything that is known of a person comes from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from openpulid.errors import FaceError, OptionError
from openpulid.faces.face import Face

logger = logging.getLogger(__name__)

ORDERS: dict[str, Callable[[Face], float]] = {
    "large-small": lambda face: -face.area,
    "small-large": lambda face: face.area,
    "left-right": lambda face: float(face.box[0] + face.box[2]),
    "right-left": lambda face: -float(face.box[0] + face.box[2]),
    "top-bottom": lambda face: float(face.box[1] + face.box[3]),
    "bottom-top": lambda face: -float(face.box[1] + face.box[3]),
}
"""What faces can be counted by; an index means nothing without one of these."""


def sort_faces(faces: Sequence[Face], order: str = "large-small") -> list[Face]:
    """The faces of one picture in a named order.

    Raises:
        OptionError: there is no such order.
    """
    if order not in ORDERS:
        raise OptionError(
            f"faces are not counted by {order!r}; the known orders are {', '.join(ORDERS)}."
        )
    return sorted(faces, key=ORDERS[order])


def select_face(
    faces: Sequence[Face],
    index: int | None = None,
    order: str = "large-small",
    label: str = "picture",
) -> Face:
    """One face of a picture's, which must have some.

    Args:
        index: its place in the order, from 0. None is the first, and a note says so where there are several.
        label: what messages call the picture.

    Raises:
        FaceError: the picture does not show so many.
        OptionError: there is no such order.
    """
    line = sort_faces(faces, order)
    place = index or 0
    if not 0 <= place < len(line):
        raise FaceError(
            f"{label}: shows {format_count(line)}, so there is no face {place}; they are counted from 0, {order}."
        )
    if index is None and len(line) > 1:
        x1, y1, x2, y2 = line[0].corners
        logger.warning(
            "%s: shows %s; the one at %d,%d to %d,%d was taken (face 0, %s)",
            label,
            format_count(line),
            x1,
            y1,
            x2,
            y2,
            order,
        )
    return line[place]


def describe_faces(
    faces: Sequence[Face], order: str = "large-small", label: str = "picture"
) -> list[str]:
    """The faces of one picture in words, a line for each, by the number that `chosen` takes. Raises as `ordered`."""
    lines = []
    for place, face in enumerate(sort_faces(faces, order)):
        x1, y1, x2, y2 = face.corners
        lines.append(f"{label}: face {place} at {x1},{y1} to {x2},{y2}, score {face.score:.2f}")
    return lines


def format_count(faces: Sequence[Face]) -> str:
    """How many, in words."""
    return f"{len(faces)} face{'s' * (len(faces) != 1)}"
