"""Small copies of dropped images, for the report: the sources may be gone when it is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from openpulid.data.decode import CHILD_SECONDS
from openpulid.data.records import KEPT, ImageRecord
from openpulid.data.sources import SourceImage
from openpulid.errors import ImageError
from openpulid.io.files import make_folder, replace_file
from openpulid.io.images import open_image

EXAMPLES = "examples"
NUM_EXAMPLES = 12
"""Images per decision."""
SIDE = 256
"""Longer side in pixels."""
COLOR = "#ff9100"


def write_examples(
    dataset: Path, records: Sequence[ImageRecord], sources: Mapping[str, SourceImage], seed: int
) -> None:
    """Write some of the dropped images of each decision to `examples/DECISION/KEY.jpg`.

    Args:
        dataset: its folder.
        records: of all images.
        sources: key -> image.
        seed: of the choice.

    Raises:
        OutputError: the disk is full.
    """
    shutil.rmtree(dataset / EXAMPLES, ignore_errors=True)
    dropped: dict[str, list[ImageRecord]] = {}
    for record in records:
        if record.decision != KEPT:
            dropped.setdefault(record.decision, []).append(record)
    for decision, group in dropped.items():
        order = np.random.default_rng(seed).permutation(len(group))[:NUM_EXAMPLES]
        folder = dataset / EXAMPLES / decision
        for index in sorted(order):
            image = _draw(group[index], sources[group[index].key])
            if image is None:
                continue
            make_folder(folder)
            with replace_file(folder / f"{group[index].key}.jpg") as temporary:
                image.save(temporary, quality=85)


def list_examples(dataset: Path, decision: str) -> list[Path]:
    """Return the files of the examples of a decision."""
    return sorted((dataset / EXAMPLES / decision).glob("*.jpg"))


def _draw(record: ImageRecord, source: SourceImage) -> Image.Image | None:
    """Draw a small copy of an image with the box of its face; None if it cannot be opened."""
    try:
        # a decoder that crashes on a damaged file must not end the preparation
        image = open_image(source.read_image(), name=source.name, time_limit=CHILD_SECONDS)
    except (ImageError, OSError):
        return None
    scale = SIDE / max(image.size)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    # the box of a duplicate is that in its crop
    if record.box and not record.crop_width:
        box = [value * min(scale, 1) for value in record.box]
        ImageDraw.Draw(image).rectangle(box, outline=COLOR, width=2)
    return image
