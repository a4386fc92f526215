"""A folder of images with captions, in files or in tar archives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from openpulid.errors import TrainingError
from openpulid.io.image_folder import (
    FolderContent,
    describe_suffixes,
    image_suffixes,
    is_system_name,
    list_folder,
    normalize_name,
)
from openpulid.io.images import open_image
from openpulid.io.tar_members import TarMember, list_members
from openpulid.io.text import decode_text

logger = logging.getLogger(__name__)

CAPTION_SUFFIX = ".txt"
ARCHIVE_SUFFIX = ".tar"
CAPTION_BYTES = 1 << 16
"""Bytes of a caption that are read; text encoders read far fewer."""


class TrainingImages(Protocol):
    """Images with captions: `CaptionedImages`, or `prepared_images.PreparedImages`."""

    @property
    def folder(self) -> str | Path:
        """The folder of the images, for messages."""

    def prefetch(self, names: Sequence[str]) -> None:
        """Read images that are needed next, where that is worth it."""

    def open_image(self, name: str) -> Image.Image:
        """Open an image."""

    def read_caption(self, name: str) -> str:
        """Return the caption of an image as one line."""

    def find_person(self, name: str) -> str | None:
        """Return who an image shows; None if unknown."""


@dataclass(frozen=True)
class CaptionedImages:
    """The images of a folder that have a caption.

    Paths are relative to the folder. That of a file in a tar archive is the path of the archive
    with the name in the archive, such as shards/0.tar/anna/1.jpg.

    Attributes:
        folder: the folder.
        captions: path of an image -> path of its caption; sorted.
        uncaptioned: images without a caption, or with an empty one.
        content: the whole folder.
        members: path -> file in an archive.
    """

    folder: Path
    captions: dict[str, str]
    uncaptioned: list[Path]
    content: FolderContent
    members: dict[str, TarMember]

    def prefetch(self, names: Sequence[str]) -> None:
        """Do nothing: files are read when they are opened."""

    def open_image(self, name: str) -> Image.Image:
        """Open an image, see `io.images.open_image`.

        Raises:
            ImageError: it cannot be used.
            OSError: the archive cannot be read.
        """
        path = self.folder / name
        member = self.members.get(name)
        return open_image(path) if member is None else open_image(member.read(), name=str(path))

    def read_caption(self, name: str) -> str:
        """Read the caption of an image in any usual encoding, as one line.

        Raises:
            OSError: the file cannot be read.
        """
        caption = self.captions[name]
        member = self.members.get(caption)
        if member is not None:
            data = member.read(CAPTION_BYTES)
        else:
            with open(self.folder / caption, "rb") as file:
                data = file.read(CAPTION_BYTES)
        return " ".join(decode_text(data).replace("\0", " ").split())

    def find_version(self, name: str) -> int:
        """Return when an image, or the archive that it is in, was last modified, in nanoseconds."""
        member = self.members.get(name)
        path = self.folder / name if member is None else member.archive
        return path.stat().st_mtime_ns

    def find_person(self, name: str) -> str | None:
        """Return who an image shows: the subfolder that it is in; None if it is in none."""
        folder = Path(name).parent
        return None if folder == Path() or folder.suffix == ARCHIVE_SUFFIX else str(folder)

    def report(self) -> None:
        """Log how many images and files of the folder are left out, and why."""
        folder = self.folder
        num_images = len(self.captions) + len(self.uncaptioned)
        if self.uncaptioned:
            logger.warning(
                "%s: skipping %d of %d images without a caption NAME.txt; the first is %s",
                folder,
                len(self.uncaptioned),
                num_images,
                self.uncaptioned[0],
            )
        known = (CAPTION_SUFFIX, ARCHIVE_SUFFIX)
        rest = [path for path in self.content.rest if path.suffix.lower() not in known]
        if rest:
            logger.warning(
                "%s: skipping %d files that are not images: %s",
                folder,
                len(rest),
                describe_suffixes(rest),
            )
        if self.content.unreadable:
            logger.warning(
                "%s: skipping %d folders or links that cannot be read; the first is %s",
                folder,
                len(self.content.unreadable),
                self.content.unreadable[0],
            )


def find_captioned_images(folder: Path, left_out: Path | None = None) -> CaptionedImages:
    """Find the images of a folder, at any depth, and the caption NAME.txt of each.

    Args:
        folder: the folder.
        left_out: a folder that is not searched.

    Raises:
        TrainingError: there is no such folder.
    """
    if not folder.is_dir():
        raise TrainingError(
            f"{folder} is not a folder: name a folder of images NAME.jpg with captions NAME.txt."
        )
    content = list_folder(folder, recursive=True, left_out=left_out)
    archives = [path for path in content.rest if path.suffix.lower() == ARCHIVE_SUFFIX]
    return _find_captions(folder, content, _list_archives(folder, archives))


def find_archived_images(archive: Path) -> CaptionedImages:
    """Find the images of one tar archive, and the caption NAME.txt of each.

    Raises:
        TrainingError: it is compressed, damaged, or no tar archive.
    """
    members = _list_archives(archive.parent, [Path(archive.name)])
    return _find_captions(archive.parent, FolderContent(), members)


def _list_archives(folder: Path, archives: Sequence[Path]) -> dict[str, TarMember]:
    """List the files in archives of a folder by their path relative to the folder."""
    return {
        str(archive / name): member
        for archive in archives
        for name, member in list_members(folder / archive).items()
        if not any(map(is_system_name, Path(name).parts))
    }


def _find_captions(
    folder: Path, content: FolderContent, members: dict[str, TarMember]
) -> CaptionedImages:
    """Find the caption of each image of a folder."""
    suffixes = image_suffixes()
    packed = [Path(name) for name in sorted(members)]
    images = [*content.images, *(path for path in packed if path.suffix.lower() in suffixes)]
    texts: dict[tuple[Path, str], Path] = {}
    for path in [*content.rest, *packed]:
        if path.suffix.lower() != CAPTION_SUFFIX:
            continue
        member = members.get(str(path))
        if (folder / path).stat().st_size if member is None else member.size:
            texts[path.parent, normalize_name(path.stem)] = path
    captions: dict[str, str] = {}
    uncaptioned = []
    for image in images:
        caption = texts.get((image.parent, normalize_name(image.stem)))
        if caption is None:
            uncaptioned.append(image)
        else:
            captions[str(image)] = str(caption)
    return CaptionedImages(folder, captions, uncaptioned, content, members)
