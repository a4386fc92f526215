"""The images that each visitor has generated."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from pathlib import Path

from openpulid.web.updates import PageImage

MAX_KEPT = 200
"""Images of a visitor. The files of older ones are removed."""


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
        """Add an image."""
        if not self.is_on or not visitor:
            return
        images = self._images.setdefault(visitor, deque())
        images.appendleft(image)
        if len(images) > MAX_KEPT:
            _remove(images.pop())

    def images(self, visitor: str | None) -> list[PageImage]:
        """Return the images of a visitor, the newest first."""
        return list(self._images.get(visitor or "", ()))

    def clear(self, visitor: str | None) -> None:
        """Remove the images of a visitor, and their files."""
        for image in self._images.pop(visitor or "", ()):
            _remove(image)


def _remove(image: PageImage) -> None:
    with suppress(OSError):
        Path(image.file).unlink()
