"""A folder of images with captions, and where their faces are."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openpulid.errors import ImageError, PulidError, TrainingError
from openpulid.faces.face import first_usable
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.io.image_folder import (
    FolderContent,
    describe_suffixes,
    list_folder,
    normalize_name,
)
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size, open_image
from openpulid.io.text import decode_text
from openpulid.training.checkpointing import write_text

logger = logging.getLogger(__name__)

CAPTION_SUFFIX = ".txt"
CAPTION_BYTES = 1 << 16
"""Bytes of a caption that are read; text encoders read far fewer."""
SAVE_SECONDS = 300
"""Time between two saves of the index while faces are detected."""
POLL_SECONDS = 10
"""Time between two reads of the index while another process detects faces."""
POSITION_LENGTH = 14

FaceIndex = dict[str, list[float] | None]
"""Image name -> box (4) and landmarks (10) of its largest face in pixels; None without a face."""


@dataclass(frozen=True)
class CaptionedImages:
    """The images of a folder that have a caption.

    Attributes:
        captions: path of an image -> path of its caption, both relative to the folder; sorted.
        uncaptioned: images without a caption, or with an empty one.
        content: the whole folder.
    """

    captions: dict[str, str]
    uncaptioned: list[Path]
    content: FolderContent

    def report(self, folder: Path) -> None:
        """Log how many images and files of the folder are left out, and why."""
        num_images = len(self.content.images)
        if self.uncaptioned:
            logger.warning(
                "%s: skipping %d of %d images without a caption NAME.txt; the first is %s",
                folder,
                len(self.uncaptioned),
                num_images,
                self.uncaptioned[0],
            )
        rest = [path for path in self.content.rest if path.suffix.lower() != CAPTION_SUFFIX]
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


def find_captioned_images(folder: Path) -> CaptionedImages:
    """Find the images of a folder, at any depth, and the caption NAME.txt of each.

    Raises:
        TrainingError: there is no such folder.
    """
    if not folder.is_dir():
        raise TrainingError(
            f"{folder} is not a folder: name a folder of images NAME.jpg with captions NAME.txt."
        )
    content = list_folder(folder, recursive=True)
    texts: dict[tuple[Path, str], Path] = {}
    for path in content.rest:
        if path.suffix.lower() == CAPTION_SUFFIX and (folder / path).stat().st_size:
            texts[path.parent, normalize_name(path.stem)] = path
    captions: dict[str, str] = {}
    uncaptioned = []
    for image in content.images:
        caption = texts.get((image.parent, normalize_name(image.stem)))
        if caption is None:
            uncaptioned.append(image)
        else:
            captions[str(image)] = str(caption)
    return CaptionedImages(captions, uncaptioned, content)


def read_caption(path: Path) -> str:
    """Read a caption in any usual encoding, as one line.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(CAPTION_BYTES)
    return " ".join(decode_text(data).replace("\0", " ").split())


def build_index(
    folder: Path,
    names: Sequence[str],
    index: Path,
    extractor: PhotoExtractor,
    on_progress: Callable[[int, int], None] | None,
) -> FaceIndex:
    """Detect the faces of all images that are not in the index yet.

    The index is saved from time to time, because a large folder takes hours.

    Args:
        folder: of the images.
        names: of the images, relative to the folder.
        index: JSON file that stores where the faces are; created and completed as needed.
        extractor: detects the faces.
        on_progress: called with the numbers of indexed images and of all images.

    Raises:
        TrainingError: the index is damaged or cannot be written.
    """
    positions = read_index(index)
    saved_at = time.monotonic()
    is_complete = all(name in positions for name in names)
    for count, name in enumerate(names, 1):
        if name not in positions:
            positions[name] = _locate_face(folder / name, extractor)
        if on_progress:
            on_progress(count, len(names))
        is_save_due = count == len(names) or time.monotonic() - saved_at > SAVE_SECONDS
        if is_save_due and not is_complete:
            write_text(index, json.dumps(positions))
            saved_at = time.monotonic()
    return positions


def wait_for_index(names: Sequence[str], index: Path) -> FaceIndex:
    """Wait for the first process to index all images.

    The file is polled, because a barrier fails after a timeout and indexing can take hours.
    """
    positions = read_index(index)
    while not set(names) <= set(positions):
        time.sleep(POLL_SECONDS)
        positions = read_index(index)
    return positions


def read_index(index: Path) -> FaceIndex:
    """Read an index; empty if there is none.

    Raises:
        TrainingError: the file is damaged.
    """
    if not index.is_file():
        return {}
    try:
        positions = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError):
        positions = None
    if not isinstance(positions, dict) or not all(map(_is_position, positions.values())):
        raise TrainingError(
            f"{index} is damaged: delete it, and faces are detected again."
        ) from None
    return positions


def _is_position(value: object) -> bool:
    """Return whether a value of an index is None, or a box and five landmarks."""
    if value is None:
        return True
    if not isinstance(value, list) or len(value) != POSITION_LENGTH:
        return False
    return all(type(number) in (int, float) and math.isfinite(number) for number in value)


def _locate_face(path: Path, extractor: PhotoExtractor) -> list[float] | None:
    """Return box and landmarks of the largest face.

    None without an upright face or a readable image: a base model would learn a turned image.
    """
    try:
        image = open_image(path)
        # the same limit as for reference images
        small = limit_size(image, extractor.detection.max_image_size or max(image.size))
        face = first_usable(extractor.detection.detect(to_tensor([small])[0]))
    except ImageError as error:
        logger.warning("%s", error)
        return None
    except PulidError as error:
        logger.warning("%s: %s", path, error)
        return None
    if face is None:
        return None
    if face.turns or "tilted" in face.defects:
        logger.warning("%s: the face is not upright, so the image is not used; turn it.", path)
        return None
    scale = max(image.size) / max(small.size)
    values = (*face.box.tolist(), *face.landmarks.flatten().tolist())
    position = [round(value * scale, 2) for value in values]
    return position if _is_position(position) else None
