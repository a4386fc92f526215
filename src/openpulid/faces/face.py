"""A detected face; the choice among several faces of an image; drawings of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from openpulid.errors import FaceError, OptionError

logger = logging.getLogger(__name__)

HEIGHT = 512
"""Height of the drawings in pixels."""
SELECTED_COLOR = "#00c853"
OTHER_COLOR = "#ff9100"


@dataclass(frozen=True, eq=False)
class Face:
    """One face in one image. Coordinates are pixels of `image`; pixel k covers [k, k + 1).

    Attributes:
        image: (3, H, W) float in [0, 1], the complete image.
        box: (4,) x1, y1, x2, y2 around the pixels of the face.
        landmarks: (5, 2) left eye, right eye, nose tip, left and right mouth corner; left has the
            smaller x.
        score: confidence of the detector, 0 to 1.
        mask: (1, H, W) float, 1 on the pixels of the face: skin, brows, eyes, nose and mouth, but
            not hair or glasses. None if the detector only returns boxes and landmarks.
        scale: pixels of the original image per pixel of `image`; large images are shrunk before
            detection.
    """

    image: Tensor
    box: Tensor
    landmarks: Tensor
    score: float
    mask: Tensor | None = None
    scale: float = 1.0

    @property
    def pixel_box(self) -> list[int]:
        """x1, y1, x2, y2 of the box in whole pixels of the original image, as used in messages."""
        return [round(value * self.scale) for value in self.box.tolist()]

    @property
    def width(self) -> float:
        """The width of the box in pixels."""
        return float(self.box[2] - self.box[0])

    @property
    def normalized_landmarks(self) -> Tensor:
        """(5, 2) landmarks in [0, 1] of the square in which the image is centered."""
        height, width = self.image.shape[-2:]
        side = max(height, width)
        margin = torch.tensor([(side - width) / 2, (side - height) / 2]).to(self.landmarks)
        return (self.landmarks + margin) / side

    @property
    def area(self) -> float:
        """The area of the box in square pixels; the largest face has the largest area."""
        return self.width * float(self.box[3] - self.box[1])


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


def draw_faces(faces: Sequence[Face], selected: Face, crops: Sequence[Tensor]) -> Image.Image:
    """Draw the image with all faces marked, followed by the crops, in one row.

    Args:
        faces: faces of one image, at least one; they are numbered in this order.
        selected: the face to mark in green.
        crops: (3, S, S) in [0, 1] each, the crops of the selected face that the encoders see.
    """
    image = _to_pil(faces[0].image)
    draw = ImageDraw.Draw(image)
    for index, face in enumerate(faces):
        _draw_face(draw, face, str(index), SELECTED_COLOR if face is selected else OTHER_COLOR)
    row = [ImageOps.contain(panel, (4 * HEIGHT, HEIGHT)) for panel in (image, *map(_to_pil, crops))]
    sheet = Image.new("RGB", (sum(panel.width for panel in row), HEIGHT), "white")
    x = 0
    for panel in row:
        sheet.paste(panel, (x, (HEIGHT - panel.height) // 2))
        x += panel.width
    return sheet


def _draw_face(draw: ImageDraw.ImageDraw, face: Face, label: str, color: str) -> None:
    """Draw the box, the label above its upper left corner, and the landmarks."""
    height, width = face.image.shape[-2:]
    thickness = max(2, min(height, width) // 200)
    font_size = max(12, max(height, width) // 32)
    label_width = font_size * len(label)
    x1, y1, x2, y2 = face.box.tolist()
    draw.rectangle((x1, y1, x2, y2), outline=color, width=thickness)
    draw.rectangle((x1, y1 - font_size, x1 + label_width, y1), fill=color)
    center = (x1 + label_width / 2, y1 - font_size / 2)
    draw.text(center, label, fill="black", font_size=font_size, anchor="mm")
    for x, y in face.landmarks.tolist():
        draw.ellipse((x - thickness, y - thickness, x + thickness, y + thickness), fill=color)


def _to_pil(image: Tensor) -> Image.Image:
    values = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).numpy()))
