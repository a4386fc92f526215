"""People of a benchmark from photographs."""

from __future__ import annotations

from pathlib import Path

from openpulid.bench.run_dir import Subject
from openpulid.errors import OptionError
from openpulid.io.images import open_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".heic", ".avif"}


def photo_subjects(folder: Path) -> list[Subject]:
    """A person for each picture NAME.jpg in a folder, or for each folder NAME in it, whose first picture is the given one and
    whose second no method sees.

    Raises:
        OptionError: no folder, no picture in it, or two people of one name.
        PictureError: one that cannot be read.
    """
    if not folder.is_dir():
        raise OptionError(
            f"{folder} is no folder; name one with a photograph, or a folder of photographs, of each person."
        )
    found = []
    for place in sorted(folder.iterdir()):
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        pictures = [
            open_image(file) for file in [f for f in files if f.suffix.lower() in SUFFIXES][:2]
        ]
        if pictures:
            name = (
                place.name if place.is_dir() else place.stem
            )  # a folder may be called "Dr. Smith"
            found.append(Subject(name, pictures[0], pictures[1] if len(pictures) > 1 else None))
    if not found:
        raise OptionError(f"{folder} holds no photographs ({', '.join(sorted(SUFFIXES))}).")
    names = [file for sitter in found for file in (sitter.name, f"{sitter.name}-other")]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(
            f"{folder}: two people would be called {', '.join(twice)}; rename one of each."
        )
    return found
