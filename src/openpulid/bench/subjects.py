"""Benchmark subjects from photos."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from openpulid.bench.run_dir import Subject
from openpulid.errors import OptionError
from openpulid.io.images import open_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".heic", ".avif"}


def load_photo_subjects(folder: Path) -> list[Subject]:
    """Load one subject per image file or per subfolder.

    An image NAME.jpg is the reference image of NAME. Of a subfolder NAME, the first image is the
    reference image and the second one is never passed to a method.

    Raises:
        OptionError: the folder is missing or has no images, or two subjects have the same name.
        PictureError: an image cannot be read.
    """
    if not folder.is_dir():
        raise OptionError(
            f"{folder} is not a folder; name a folder with one photo, or one folder of photos, "
            "per person."
        )
    subjects = []
    for path in sorted(folder.iterdir()):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        photos = [file for file in files if file.suffix.lower() in SUFFIXES][:2]
        if not photos:
            continue
        images = [open_image(photo) for photo in photos]
        name = path.name if path.is_dir() else path.stem  # a folder may be called "Dr. Smith"
        subjects.append(Subject(name, images[0], images[1] if len(images) > 1 else None))
    if not subjects:
        raise OptionError(f"{folder} contains no photos ({', '.join(sorted(SUFFIXES))}).")
    _check_names(subjects, folder)
    return subjects


def _check_names(subjects: list[Subject], folder: Path) -> None:
    """Raise an error if two files of a run directory would have the same name."""
    file_names = Counter(
        name for subject in subjects for name in (subject.name, f"{subject.name}-other")
    )
    if duplicates := sorted(name for name, count in file_names.items() if count > 1):
        raise OptionError(
            f"{folder}: two people would be called {', '.join(duplicates)}; rename one of each."
        )
