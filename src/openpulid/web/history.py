"""The images that each visitor has generated."""

from __future__ import annotations

import shutil
from collections import deque
from contextlib import suppress
from filecmp import cmp
from glob import escape
from pathlib import Path

from openpulid.web.updates import PageImage

MAX_KEPT = 200
"""Images of a visitor. The files of older ones are removed."""

UPLOADS = "uploads"
"""Name of the folder of uploads."""

ARCHIVE = "images-{}.zip"
"""All images of a run, in its folder."""


class History:
    """Keeps the images of each visitor until the page stops.

    A visitor is a secret that their browser keeps. Nobody sees the images of somebody else.

    Args:
        is_on: whether images are kept.
        uploads: folder of the uploads, and of Gradio's copies of the images.
    """

    def __init__(self, is_on: bool, uploads: Path) -> None:
        self.is_on = is_on
        self._uploads = uploads
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
                self._remove(file)

    def images(self, visitor: str | None) -> list[PageImage]:
        """Return the images of a visitor, the newest first."""
        return list(self._images.get(visitor or "", ()))

    def clear(self, visitor: str | None) -> None:
        """Remove the images of a visitor, the folders of their runs, and copies of both."""
        for folder in {Path(image.file).parent for image in self._images.pop(visitor or "", ())}:
            for file in folder.glob("*"):
                self._remove(file)
            shutil.rmtree(folder, ignore_errors=True)

    def _remove(self, file: Path) -> None:
        """Remove a file of a run, and Gradio's copies of it, which would still be served."""
        with suppress(OSError):
            for copy in self._uploads.glob(f"*/{escape(file.name)}"):
                if cmp(file, copy, shallow=False):
                    copy.unlink()
        file.unlink(missing_ok=True)
