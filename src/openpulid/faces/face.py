"""A detected face; the choice among several faces of an image; drawings of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from openpulid.errors import FaceError, OptionError, suggest
from openpulid.faces.align import turn_points
from openpulid.io.image_grid import to_pil

logger = logging.getLogger(__name__)

MIN_LANDMARK_EXTENT = 0.1
"""Distance in pixels over which the landmarks of a face must extend."""

TURNS = {1: "90 degrees counterclockwise", 2: "180 degrees", 3: "90 degrees clockwise"}
"""`Face.turns` in words."""

HEIGHT = 512
"""Height of the drawings in pixels."""
SELECTED_COLOR = "#00c853"
OTHER_COLOR = "#ff9100"

Defect = Literal["small", "blurred", "tilted"]


@dataclass(frozen=True, eq=False)
class Face:
    """One face in one image. Coordinates are pixels of `image`; pixel k covers [k, k + 1).

    Attributes:
        image: (3, H, W) float in [0, 1], the complete image.
        box: (4,) x1, y1, x2, y2 around the pixels of the face.
        landmarks: (5, 2) left eye, right eye, nose tip, left and right mouth corner; left has the
            smaller x when the face is upright.
        score: confidence of the detector, 0 to 1.
        mask: (1, H, W) float, 1 on the pixels of the face: skin, brows, eyes, nose and mouth, but
            not hair or glasses. None if the detector only returns boxes and landmarks.
        scale: pixels of the original image per pixel of `image`; large images are shrunk before
            detection.
        turns: number of quarter turns, counterclockwise, that make the face upright.
        defects: what makes the identity of this face uncertain.
    """

    image: Tensor
    box: Tensor
    landmarks: Tensor
    score: float
    mask: Tensor | None = None
    scale: float = 1.0
    turns: int = 0
    defects: frozenset[Defect] = frozenset()

    @property
    def pixel_box(self) -> list[int]:
        """x1, y1, x2, y2 of the box in whole pixels of the original image, as used in messages."""
        return [round(value * self.scale) for value in self.box.tolist()]

    @property
    def width(self) -> float:
        """The width of the box in pixels."""
        return float(self.box[2] - self.box[0])

    @property
    def shorter_side(self) -> float:
        """The shorter side of the box in pixels: the width of an upright face."""
        return min(self.width, float(self.box[3] - self.box[1]))

    @property
    def longer_side(self) -> float:
        """The longer side of the box in pixels."""
        return max(self.width, float(self.box[3] - self.box[1]))

    @property
    def upright_image(self) -> Tensor:
        """The image, turned so that the face is upright; (3, H, W) or (3, W, H)."""
        return torch.rot90(self.image, self.turns, (1, 2)) if self.turns else self.image

    @property
    def normalized_landmarks(self) -> Tensor:
        """(5, 2) landmarks in [0, 1] of the square in which the upright image is centered."""
        height, width = self.image.shape[-2:]
        side = max(height, width)
        margin = torch.tensor([(side - width) / 2, (side - height) / 2]).to(self.landmarks)
        return turn_points((self.landmarks + margin) / side, self.turns, (1, 1))

    @property
    def has_usable_landmarks(self) -> bool:
        """Whether the landmarks are finite and apart, so that a crop can be aligned to them."""
        extent = self.landmarks.amax(0) - self.landmarks.amin(0)
        return bool(self.landmarks.isfinite().all() and extent.max() > MIN_LANDMARK_EXTENT)

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


def check_order(order: str) -> None:
    """Raise OptionError if there is no such order of faces."""
    if order not in ORDERS:
        raise OptionError(
            f"unknown face order {order!r}{suggest(order, ORDERS)}; "
            f"choose from {', '.join(ORDERS)}."
        )


def sort_faces(faces: Sequence[Face], order: str = "large-small") -> list[Face]:
    """Sort the faces of an image.

    Args:
        faces: the faces of one image.
        order: a key of `ORDERS`.

    Raises:
        OptionError: there is no such order.
    """
    check_order(order)
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


def require_landmarks(face: Face) -> None:
    """Check that a crop can be aligned to the landmarks of a face.

    Raises:
        FaceError: they are not finite, or all at one point.
    """
    if not face.has_usable_landmarks:
        raise FaceError(
            "no face that can be aligned was detected: its landmarks are at one point or not "
            "finite; use another image."
        )


def first_usable(faces: Sequence[Face]) -> Face | None:
    """Return the first face to whose landmarks a crop can be aligned."""
    return next((face for face in faces if face.has_usable_landmarks), None)


def describe_faces(
    faces: Sequence[Face], order: str = "large-small", label: str = "image"
) -> list[str]:
    """Describe each face of an image in a line, with the index that `select_face` takes.

    The line ends with the defects of the face, if it has any.

    Raises:
        OptionError: there is no such order.
    """
    lines = []
    for index, face in enumerate(sort_faces(faces, order)):
        x1, y1, x2, y2 = face.pixel_box
        details = [f"{label}: face {index} at {x1},{y1} to {x2},{y2}", f"score {face.score:.2f}"]
        details += [f"turn by {TURNS[face.turns]}"] if face.turns else []
        lines.append(", ".join([*details, *sorted(face.defects)]))
    return lines


def describe_defects(face: Face, label: str = "image") -> list[str]:
    """Describe in sentences what makes the identity of a face uncertain, and what was turned."""
    height, width = face.image.shape[-2:]
    notes = []
    if face.turns:
        notes.append(f"the face is not upright; it is read after turning by {TURNS[face.turns]}.")
    if "tilted" in face.defects:
        notes.append("the face is tilted by more than 45 degrees; turn the image upright.")
    if "small" in face.defects:
        size = f"{width} x {height} pixels"
        image = f"the image of {size}" if face.scale == 1 else f"the image, reduced to {size}"
        notes.append(
            f"the face is only {round(face.shorter_side)} pixels wide in {image}, so its identity "
            "is uncertain; use a larger image, or crop it around the face."
        )
    if "blurred" in face.defects:
        notes.append("the face is blurred, so its identity is uncertain; use a sharper image.")
    return [f"{label}: {note}" for note in notes]


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
    image, *crop_images = (to_pil(pixels[None])[0] for pixels in (faces[0].image, *crops))
    draw = ImageDraw.Draw(image)
    for index, face in enumerate(faces):
        _draw_face(draw, face, str(index), SELECTED_COLOR if face is selected else OTHER_COLOR)
    row = [ImageOps.contain(panel, (4 * HEIGHT, HEIGHT)) for panel in (image, *crop_images)]
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
