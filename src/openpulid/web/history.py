"""The images that each visitor has generated."""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path

from openpulid.web.updates import PageImage

MAX_KEPT = 200
"""Images of a visitor. The files of older ones are removed."""

ARCHIVE = "images-{}.zip"
"""All images of a run, in its folder."""


class History:
    """Keeps the images of each visitor until the page stops.

    A visitor is a secret that their browser keeps. Nobody sees the images of somebody else.

    Args:
        is_on: whether images are kept.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self._images: dict[str, deque[PageImage]] = {}

    def add(self, visitor: str | None, image: PageImage) -> None:
        """Add an image, whose folder holds the files of a single run."""
        if not self.is_on or not visitor:
            return
        images = self._images.setdefault(visitor, deque())
        images.appendleft(image)
        if len(images) > MAX_KEPT:
            oldest = Path(images.pop().file)
            for file in (oldest, *oldest.parent.glob(ARCHIVE.format("*"))):
                file.unlink(missing_ok=True)

    def images(self, visitor: str | None) -> list[PageImage]:
        """Return the images of a visitor, the newest first."""
        return list(self._images.get(visitor or "", ()))

    def clear(self, visitor: str | None) -> None:
        """Remove the images of a visitor, and the folders of their runs."""
        for folder in {Path(image.file).parent for image in self._images.pop(visitor or "", ())}:
            shutil.rmtree(folder, ignore_errors=True)
