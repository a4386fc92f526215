"""Arrange the images of `make demo` for the front page.

    pulid demo -o demo && python docs/make_demo_image.py demo

The demo's page holds each image as PNG, in rows of three: the reference image, the image without
and the image with the identity. The reference image is the same in every row.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE, GAP, TEXT, LEFT = 172, 8, 30, 24
BACKGROUND, INK = "#ffffff", "#404048"
OUTPUT = Path(__file__).with_name("demo.jpg")


def main(directory: Path) -> None:
    """Write `docs/demo.jpg` from the page of a demo."""
    page = (directory / "index.html").read_text("utf-8")
    sources = re.findall(r"data:image/png;base64,([\w+/=]+)", page)
    images = [Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB") for source in sources]
    reference = images[0]
    rows = (images[1::3], images[2::3])

    columns = len(rows[0])
    first = LEFT + TILE + 3 * GAP
    width = first + columns * (TILE + GAP) + LEFT - GAP
    height = 2 * (TEXT + TILE) + 3 * GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(17)

    middle = (height - TILE - TEXT) // 2
    draw.text((LEFT, middle + 4), "reference image", INK, font)
    sheet.paste(enlarge(reference), (LEFT, middle + TEXT))
    for k, (label, row) in enumerate(zip(("without identity", "with identity"), rows, strict=True)):
        top = GAP + k * (TEXT + TILE + GAP)
        draw.text((first, top + 4), label, INK, font)
        for column, image in enumerate(row):
            sheet.paste(enlarge(image), (first + column * (TILE + GAP), top + TEXT))
    sheet.save(OUTPUT, quality=90)
    print(OUTPUT)


def enlarge(image: Image.Image) -> Image.Image:
    """Resize an image to the size of a tile."""
    return image.resize((TILE, TILE), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
