"""Benchmark subjects from photos."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from openpulid.bench.run_dir import Subject
from openpulid.errors import OptionError
from openpulid.io.image_folder import (
    FolderContent,
    describe_suffixes,
    image_suffixes,
    list_folder,
    normalize_name,
)
from openpulid.io.images import open_image
from openpulid.io.text import decode_text

logger = logging.getLogger(__name__)

MAX_NAME_BYTES = 200
"""Longest name of a person; the names of a run's files are longer, and 255 bytes at most."""


@dataclass(frozen=True)
class PersonFiles:
    """The photos of a person.

    Attributes:
        name: of the person.
        photos: one photo, or two.
    """

    name: str
    photos: list[Path]


def load_photo_subjects(folder: Path, limit: int | None = None) -> list[Subject]:
    """Load one subject per image file or per subfolder; log what is left out.

    An image NAME.jpg is the reference image of NAME. Of a subfolder NAME, the first image is the
    reference image and the second one is never passed to a method. Links are followed. Files of
    the system, such as `._NAME.jpg` of macOS, are ignored.

    Args:
        folder: of the people.
        limit: number of subjects; None loads all.

    Raises:
        OptionError: the folder is missing or has no images, or a name cannot be used.
        ImageError: an image cannot be read.
    """
    subjects = []
    for person in find_people(folder)[:limit]:
        images = [open_image(photo) for photo in person.photos]
        subjects.append(Subject(person.name, images[0], images[1] if len(images) > 1 else None))
    return subjects


def find_people(folder: Path) -> list[PersonFiles]:
    """Find the photos of all people in a folder, without opening them.

    Raises:
        OptionError: see `load_photo_subjects`.
    """
    if not folder.is_dir():
        raise OptionError(
            f"{folder} is not a folder; name a folder with one photo, or one folder of photos, "
            "per person."
        )
    content = list_folder(folder, recursive=False)
    people = [PersonFiles(_to_text(path.stem), [folder / path]) for path in content.images]
    left_out = _describe_rest(content)
    for path in content.folders:
        photos = list_folder(folder / path, recursive=False)
        if photos.images:
            # a folder may be called "Dr. Smith"
            paths = [folder / path / name for name in photos.images[:2]]
            people.append(PersonFiles(_to_text(path.name), paths))
        else:
            left_out.append(f"{path} without an image of its own")
        left_out += [f"{text} in {path}" for text in _describe_rest(photos, len(photos.images) - 2)]
        if photos.folders:
            left_out.append(f"{len(photos.folders)} subfolders of {path}")
    if left_out:
        logger.warning("%s: left out: %s", folder, "; ".join(left_out))
    if not people:
        raise OptionError(f"{folder} contains no photos ({', '.join(sorted(image_suffixes()))}).")
    people.sort(key=lambda person: person.name)
    _check_names([person.name for person in people], folder)
    return people


def _describe_rest(content: FolderContent, num_further: int = 0) -> list[str]:
    """Describe the files of a folder that are not used.

    Args:
        content: of the folder.
        num_further: number of images that are not used.
    """
    parts = []
    if num_further > 0:
        parts.append(f"{num_further} further images")
    if content.rest:
        parts.append(
            f"{len(content.rest)} files that are not images ({describe_suffixes(content.rest)})"
        )
    if content.unreadable:
        parts.append(f"{len(content.unreadable)} links or folders that cannot be read")
    return parts


def _to_text(name: str) -> str:
    """Decode a file name in another encoding than the system's, which Python keeps as bytes."""
    return decode_text(os.fsencode(name))


def _check_names(names: list[str], folder: Path) -> None:
    """Raise an error for names that the files of a run directory cannot have.

    Some file systems do not distinguish upper and lower case, or the two ways to write an accent.
    """
    by_form: dict[str, list[str]] = {}
    for name in names:
        for variant in (name, f"{name}-other"):
            by_form.setdefault(normalize_name(variant), []).append(variant)
    if duplicates := sorted(variants[0] for variants in by_form.values() if len(variants) > 1):
        raise OptionError(
            f"{folder}: two people would be called {', '.join(duplicates)}; rename one of each."
        )
    for name in names:
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise OptionError(
                f"{folder}: the name {name[:40]}... is longer than {MAX_NAME_BYTES} bytes; "
                "shorten it."
            )
