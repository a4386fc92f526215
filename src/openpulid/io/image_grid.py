"""Image grids with captions, and conversion of images: PIL, tensors, gray."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

PAPER = (250, 249, 246)
INK = (32, 32, 36)
SOFT = (120, 118, 112)

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601)."""

MAX_CAPTION_LINES = 6
MIN_FONT_SIZE = 10


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert a tensor (B, 3, H, W) in [0, 1] to B PIL images."""
    values = (images.detach().float().clamp(0, 1) * 255).round().byte()
    arrays = values.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Convert PIL images of one size to a float tensor (B, 3, H, W) in [0, 1]."""
    values = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255


def luminance(images: Tensor) -> Tensor:
    """Convert RGB images (B, 3, H, W) to gray (B, 1, H, W) with the weights `LUMA`."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def upscale(image: Image.Image, side: int) -> Image.Image:
    """Resize an image smoothly to `side` x `side` pixels, with margins if it is not square."""
    return ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, PAPER)


def image_grid(rows: Sequence[Sequence[Image.Image]], side: int, gap: int = 2) -> Image.Image:
    """Draw rows of images, each `side` x `side` pixels, `gap` pixels apart."""
    step = side + gap
    num_columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (num_columns * step - gap, len(rows) * step - gap), PAPER)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(upscale(image, side), (x * step, y * step))
    return grid


def captioned_grid(
    images: Sequence[tuple[Image.Image, str]], columns: int = 6, side: int = 192
) -> Image.Image:
    """Draw images with a caption below each; long captions are wrapped.

    Args:
        images: (image, caption) pairs, row by row.
        columns: number of images per row.
        side: width and height of each image in pixels.
    """
    gap = 10
    line_height = 16
    captions = [textwrap.wrap(text, side // 7)[:MAX_CAPTION_LINES] for _, text in images]
    row_height = side + line_height * max(map(len, captions), default=0) + gap
    num_rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + gap), num_rows * row_height), PAPER)
    draw = ImageDraw.Draw(page)
    for index, ((image, _), lines) in enumerate(zip(images, captions, strict=True)):
        x = index % columns * (side + gap)
        y = index // columns * row_height
        page.paste(upscale(image, side), (x, y))
        for row, line in enumerate(lines):
            _draw_text(draw, line, (x, y + side + row * line_height), 13, INK, side)
    return page


def labeled_grid(
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]],
    side: int = 288,
    footer: str = "",
) -> Image.Image:
    """Draw a titled grid with a label above each column and text above each row.

    Args:
        title: the heading of the page.
        columns: the labels of the columns; long ones are wrapped.
        rows: (text, images) pairs; every row has one image per column, or None for a gap. Long text
            is wrapped; a row without text has no line above it.
        side: width and height of each image in pixels.
        footer: text below the grid, which is wrapped.
    """
    gap = 16
    margin = 24
    line_height = 40
    label_height = 25  # of a line below the first, which has `line_height`
    width = 2 * margin + len(columns) * (side + gap) - gap
    labels = [textwrap.wrap(label, max(1, side // 11))[:MAX_CAPTION_LINES] for label in columns]
    top = margin + 2 * line_height - 14
    head = line_height + label_height * (max(map(len, labels), default=1) - 1)
    footer_lines = textwrap.wrap(footer, width // 11)
    texts = [textwrap.wrap(text, (width - 2 * margin) // 8) for text, _ in rows]
    # the last line of a text has the height of a line, those before it that of a label
    text_heights = [line_height + label_height * (len(text) - 1) if text else 0 for text in texts]
    height = margin + 2 * line_height + head + sum(text_heights) + len(rows) * (side + gap)
    height += len(footer_lines) * label_height + margin
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    _draw_text(draw, title, (margin, margin), 28, INK, width - 2 * margin)
    for x, lines in enumerate(labels):
        for line_number, line in enumerate(lines):
            position = (margin + x * (side + gap), top + line_number * label_height)
            _draw_text(draw, line, position, 21, SOFT, side)
    y = top + head
    for lines, text_height, (_, images) in zip(texts, text_heights, rows, strict=True):
        font_size = 23 if len(lines) == 1 else 17  # equal for all lines
        for line_number, line in enumerate(lines):
            position = (margin, y + line_number * label_height)
            _draw_text(draw, line, position, font_size, INK, width - 2 * margin)
        y += text_height
        for x, image in enumerate(images):
            if image is not None:
                page.paste(upscale(image, side), (margin + x * (side + gap), y))
        y += side + gap
    for line in footer_lines:
        _draw_text(draw, line, (margin, y), 21, INK, width - 2 * margin)
        y += label_height
    return page


def _draw_text(
    draw: ImageDraw.ImageDraw,
    text: str,
    position: tuple[int, int],
    size: int,
    color: tuple[int, ...],
    width: int,
) -> None:
    """Draw one line of text, in a smaller font if it is wider than `width` pixels."""
    font = ImageFont.load_default(size)
    while size > MIN_FONT_SIZE and draw.textlength(text, font) > width:
        size -= 1
        font = ImageFont.load_default(size)
    draw.text(position, text, fill=color, font=font)
