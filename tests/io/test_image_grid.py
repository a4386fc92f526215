"""Labeled grids: text fits the page."""

from __future__ import annotations

import numpy as np
from PIL import Image

from openpulid.io.image_grid import PAPER, labeled_grid

SIDE = 100
MARGIN = 24
PROMPT = "photo, portrait, short red hair, yellow clothes, laughing, bearded, wearing glasses"


def test_long_text_of_a_row_is_wrapped() -> None:
    images = [Image.new("RGB", (8, 8), "gray")] * 2
    columns = ["reference", "base"]
    short = labeled_grid("faces", columns, [("photo", images)] * 2, SIDE)
    long = labeled_grid("faces", columns, [(PROMPT, images), ("photo", images)], SIDE)
    num_lines = (long.height - short.height) / 25 + 1
    assert long.width == short.width and num_lines in (3, 4)
    right = np.asarray(long)[:, long.width - MARGIN :]
    assert (right == PAPER).all()  # nothing is drawn in the margin
    gray = (np.asarray(long) == 128).all(2)[:, MARGIN : MARGIN + SIDE]
    assert gray.all(1).sum() == 2 * SIDE  # no text on the images
