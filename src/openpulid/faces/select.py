"""Selection and order of faces in an image that shows several.

One face is selected once; all features of a person come from it.
"""

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
"""Sort keys by name. The index of a face refers to one of these orders."""


def sort_faces(faces: Sequence[Face], order: str = "large-small") -> list[Face]:
    """Sort the faces of an image.

    Args:
        faces: the faces of one image.
        order: a key of `ORDERS`.

    Raises:
        OptionError: there is no such order.
    """
    if order not in ORDERS:
        raise OptionError(f"unknown face order {order!r}; choose from {', '.join(ORDERS)}.")
    return sorted(faces, key=ORDERS[order])


def select_face(
    faces: Sequence[Face],
    index: int | None = None,
    order: str = "large-small",
    label: str = "image",
) -> Face:
    """Select one face of an image.

    Args:
        faces: the faces of one image, at least one.
        index: position in the order, from 0. None selects the first face and logs a warning if
            there are several.
        order: a key of `ORDERS`.
        label: the name of the image in messages.

    Raises:
        FaceError: the image has no face with this index.
        OptionError: there is no such order.
    """
    ordered = sort_faces(faces, order)
    position = index or 0
    if not 0 <= position < len(ordered):
        raise FaceError(
            f"{label}: there is no face {position}; "
            f"the image has {format_count(ordered)}, counted from 0 in the order {order}."
        )
    if index is None and len(ordered) > 1:
        logger.warning(
            "%s: the image has %s; using face 0 at %d,%d to %d,%d (order %s)",
            label,
            format_count(ordered),
            *ordered[0].pixel_box,
            order,
        )
    return ordered[position]


def describe_faces(
    faces: Sequence[Face], order: str = "large-small", label: str = "image"
) -> list[str]:
    """Describe each face of an image in a line, with the index that `select_face` takes.

    Raises:
        OptionError: there is no such order.
    """
    lines = []
    for index, face in enumerate(sort_faces(faces, order)):
        x1, y1, x2, y2 = face.pixel_box
        lines.append(f"{label}: face {index} at {x1},{y1} to {x2},{y2}, score {face.score:.2f}")
    return lines


def format_count(faces: Sequence[Face]) -> str:
    """Return the number of faces as text, such as "1 face"."""
    return f"{len(faces)} face{'s' * (len(faces) != 1)}"
