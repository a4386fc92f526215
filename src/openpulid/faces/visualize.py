"""A picture of what was found: boxes, landmarks, numbers, and what is read of the chosen face."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from openpulid.faces.face import Face

HEIGHT = 512
SELECTED_COLOR, OTHER_COLOR = "#00c853", "#ff9100"


def draw_faces(faces: Sequence[Face], chosen: Face, read: Sequence[Tensor]) -> Image.Image:
    """One row: the picture with every face's box and number in the order given, the chosen one green; then `read`.

    Args:
        faces: of one picture, at least one.
        read: (3, S, S) in [0, 1], what is read of the chosen face.
    """
    picture = _pil(faces[0].image)
    pen, thick = ImageDraw.Draw(picture), max(2, min(picture.size) // 200)
    for number, face in enumerate(faces):
        colour = SELECTED_COLOR if face is chosen else OTHER_COLOR
        x1, y1, x2, y2 = face.box.tolist()
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=thick)
        size = max(12, max(picture.size) // 32)
        pen.rectangle((x1, y1 - size, x1 + size * len(str(number)), y1), fill=colour)
        pen.text(
            (x1 + size * len(str(number)) / 2, y1 - size / 2),
            str(number),
            fill="black",
            font_size=size,
            anchor="mm",
        )
        for x, y in face.landmarks.tolist():
            pen.ellipse((x - thick, y - thick, x + thick, y + thick), fill=colour)
    row = [ImageOps.contain(image, (4 * HEIGHT, HEIGHT)) for image in (picture, *map(_pil, read))]
    sheet = Image.new("RGB", (sum(image.width for image in row), HEIGHT), "white")
    left = 0
    for image in row:
        sheet.paste(image, (left, (HEIGHT - image.height) // 2))
        left += image.width
    return sheet


def _pil(image: Tensor) -> Image.Image:
    values = (
        (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    )
    return Image.fromarray(np.ascontiguousarray(values))
