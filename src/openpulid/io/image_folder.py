"""Find the images of a folder, and count what is left out."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from openpulid.io.decoding import FORMATS, JPEG_FORMATS

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
"""Endings of HEIF files, which Pillow knows only with the package pillow-heif."""

SYSTEM_NAMES = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
    }
)
"""Files and folders that systems add to a user's folders, in lower case; see `is_system_name`."""


@dataclass(frozen=True)
class FolderContent:
    """The files of a folder.

    Attributes:
        images: paths of the images, relative to the folder, sorted.
        rest: paths of all other files, relative to the folder, sorted.
        unreadable: folders and links that cannot be followed, relative to the folder.
        folders: subfolders that were not searched, relative to the folder, sorted.
    """

    images: list[Path] = field(default_factory=list)
    rest: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def image_suffixes() -> frozenset[str]:
    """Return the endings of all formats that `open_image` reads, in lower case."""
    Image.init()
    registered = Image.registered_extensions().items()
    return HEIF_SUFFIXES | {
        suffix for suffix, name in registered if name in (*JPEG_FORMATS, *FORMATS)
    }


def is_system_name(name: str) -> bool:
    """Return whether a file or folder was added by a system, not by the user.

    These are hidden files, such as `.DS_Store`, and the `._NAME` that macOS writes next to NAME on
    other file systems, which has the ending of an image and is none.
    """
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def list_folder(folder: Path, *, recursive: bool, left_out: Path | None = None) -> FolderContent:
    """List the files of a folder; files of the system are left out.

    Links are followed. A folder that can be reached in several ways is listed once, and not by a
    link if it is part of the tree itself.

    Args:
        folder: the folder.
        recursive: whether to search subfolders, at any depth.
        left_out: a folder that is not searched; it need not exist.
    """
    content = FolderContent()
    suffixes = image_suffixes()
    folders = [str(folder)]
    links: list[str] = []
    visited: set[tuple[int, int]] = set()
    if left_out is not None and left_out.exists():
        status = left_out.stat()
        visited.add((status.st_dev, status.st_ino))
    while folders or links:
        current = folders.pop() if folders else links.pop()
        for entry in _list_once(current, visited, content.unreadable):
            path = Path(entry.path)
            if _is_directory(entry):
                if not recursive:
                    content.folders.append(path)
                else:
                    (links if entry.is_symlink() else folders).append(entry.path)
            elif not _is_file(entry):  # a broken link, a socket, ...
                content.unreadable.append(path)
            elif path.suffix.lower() in suffixes:
                content.images.append(path)
            else:
                content.rest.append(path)
    return FolderContent(
        *(
            sorted((path.relative_to(folder) for path in paths), key=str)
            for paths in (content.images, content.rest, content.unreadable, content.folders)
        )
    )


def _list_once(
    folder: str, visited: set[tuple[int, int]], unreadable: list[Path]
) -> list[os.DirEntry[str]]:
    """List a folder without the system's files, unless it was visited before."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            content = [entry for entry in entries if not is_system_name(entry.name)]
    except OSError:
        unreadable.append(Path(folder))
        return []
    if (status.st_dev, status.st_ino) in visited:
        return []
    visited.add((status.st_dev, status.st_ino))
    return sorted(content, key=lambda entry: entry.name)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def normalize_name(name: str) -> str:
    """Return a form that is equal for names that look alike.

    Upper and lower case are the same file on some file systems. An accent is a part of its letter
    in the names of most systems, and a character of its own in those of macOS.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def describe_suffixes(paths: list[Path]) -> str:
    """Describe files by their endings, the most frequent first: "3 .mp4, 1 .cr2"."""
    counts = Counter(path.suffix.lower() or "without an ending" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
