"""Pictures of pictures: from tensors, larger, side by side with words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, SOFT = (250, 249, 246), (32, 32, 36), (120, 118, 112)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] as B pictures."""
    values = (
        (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    )
    return [Image.fromarray(value) for value in values]


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (B, 3, H, W) floats in [0, 1]."""
    values = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255


def upscale(picture: Image.Image, side: int) -> Image.Image:
    """The picture at `side` pixels, smooth: at 96 px a face would be a stamp."""
    return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def image_grid(rows: Sequence[Sequence[Image.Image]], side: int, gap: int = 2) -> Image.Image:
    """Rows of pictures, each `side` pixels wide and high."""
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (side + gap) - gap, len(rows) * (side + gap) - gap), PAPER)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(upscale(picture, side), (x * (side + gap), y * (side + gap)))
    return sheet


def captioned_grid(
    pictures: Sequence[tuple[Image.Image, str]], columns: int = 6, side: int = 192
) -> Image.Image:
    """Pictures with a line of words under each; long lines are broken."""
    gap, line = 10, 16
    lines = [textwrap.wrap(words, side // 7)[:6] for _, words in pictures]
    height = side + line * max(map(len, lines), default=0) + gap
    page = Image.new("RGB", (columns * (side + gap), -(-len(pictures) // columns) * height), PAPER)
    draw = ImageDraw.Draw(page)
    for k, ((picture, _), said) in enumerate(zip(pictures, lines, strict=True)):
        x, y = k % columns * (side + gap), k // columns * height
        page.paste(upscale(picture, side), (x, y))
        for row, words in enumerate(said):
            _draw_text(draw, words, (x, y + side + row * line), 13, INK, side)
    return page


def labeled_grid(
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    side: int = 288,
) -> Image.Image:
    """A tall picture: a title, a word above each column, a sentence above each row of pictures."""
    gap, margin, line = 16, 24, 40
    width = 2 * margin + len(columns) * (side + gap) - gap
    height = margin + 3 * line + len(rows) * (line + side + gap) + margin
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    _draw_text(draw, title, (margin, margin), 28, INK, width - 2 * margin)
    y = margin + 2 * line - 14
    for x, name in enumerate(columns):
        _draw_text(draw, name, (margin + x * (side + gap), y), 21, SOFT, side)
    y += line
    for sentence, pictures in rows:
        _draw_text(draw, sentence, (margin, y), 23, INK, width - 2 * margin)
        y += line
        for x, picture in enumerate(pictures):
            page.paste(upscale(picture, side), (margin + x * (side + gap), y))
        y += side + gap
    return page


def _draw_text(
    draw: ImageDraw.ImageDraw,
    text: str,
    place: tuple[int, int],
    size: int,
    color: tuple[int, ...],
    width: int,
) -> None:
    """One line, smaller where it would not fit."""
    font = ImageFont.load_default(size)
    while size > 10 and draw.textlength(text, font) > width:
        size -= 1
        font = ImageFont.load_default(size)
    draw.text(place, text, fill=color, font=font)
