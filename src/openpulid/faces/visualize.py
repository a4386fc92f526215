"""Debug images of face detection: boxes, landmarks, indices, and the crops of the selected face."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from openpulid.faces.face import Face

HEIGHT = 512
SELECTED_COLOR = "#00c853"
OTHER_COLOR = "#ff9100"


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
