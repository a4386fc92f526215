"""Decode the images of the sources."""

from __future__ import annotations

from pathlib import Path

import imagehash
from PIL import Image

from openpulid.data.options import PrepareOptions
from openpulid.data.records import ImageRecord
from openpulid.data.sources import SourceImage
from openpulid.errors import ImageError
from openpulid.io.images import MAX_BYTES, open_image

CHILD_SECONDS = 60
"""Time limit of a child process that decodes one image."""


def decode_image(
    source: SourceImage,
    record: ImageRecord,
    options: PrepareOptions,
    time_limit: float | None = None,
) -> Image.Image | None:
    """Read and decode an image; complete its record with size, perceptual hash and given caption.

    Args:
        source: the image.
        record: the record.
        options: see there.
        time_limit: decode in a child process with so many seconds of processor time.

    Returns:
        The image; None if it cannot be used, which is recorded.
    """
    try:
        content = source.read_image()
        if isinstance(content, Path):
            with open(content, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        image = open_image(content, name=source.name, time_limit=time_limit)
        if not options.replace_captions:
            record.caption = source.read_caption()
    except (ImageError, OSError) as error:
        record.decision = "unreadable"
        record.error = getattr(error, "reason", None) or str(error)
        return None
    record.width, record.height = image.size
    if max(image.size) > options.filters.max_aspect * min(image.size):
        record.decision = "aspect"
        return None
    record.phash = int(str(imagehash.phash(image)), 16)
    return image
