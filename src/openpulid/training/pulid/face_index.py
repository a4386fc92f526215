"""Where the faces of a folder of images are, in a JSON file."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from openpulid.data.captioned_images import CaptionedImages
from openpulid.errors import ImageError, PulidError, TrainingError
from openpulid.faces.face import first_usable
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size
from openpulid.training.checkpointing import write_text

logger = logging.getLogger(__name__)

SAVE_SECONDS = 300
"""Time between two saves of the index while faces are detected."""
POLL_SECONDS = 10
"""Time between two reads of the index while another process detects faces."""
POSITION_LENGTH = 16

FaceIndex = dict[str, list[float] | None]
"""Image name -> box (4) and landmarks (10) of its largest face in pixels, width and height of the
image; None without a face."""


def build_index(
    images: CaptionedImages,
    index: Path,
    extractor: PhotoExtractor,
    on_progress: Callable[[int, int], None] | None,
) -> FaceIndex:
    """Detect the faces of all images that are not in the index yet.

    The index is saved from time to time, because a large folder takes hours.

    Args:
        images: the images.
        index: JSON file that stores where the faces are; created and completed as needed.
        extractor: detects the faces.
        on_progress: called with the numbers of indexed images and of all images.

    Raises:
        TrainingError: the index is damaged or cannot be written.
    """
    names = list(images.captions)
    positions = read_index(index)
    saved_at = time.monotonic()
    is_complete = all(name in positions for name in names)
    for count, name in enumerate(names, 1):
        if name not in positions:
            positions[name] = _locate_face(images, name, extractor)
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
    """Return whether a value of an index is None, or a box, five landmarks and a size."""
    if value is None:
        return True
    if not isinstance(value, list) or len(value) != POSITION_LENGTH:
        return False
    return all(type(number) in (int, float) and math.isfinite(number) for number in value)


def _locate_face(
    images: CaptionedImages, name: str, extractor: PhotoExtractor
) -> list[float] | None:
    """Return box and landmarks of the largest face, and the size of the image.

    None without an upright face or a readable image: a base model would learn a turned image.
    """
    path = images.folder / name
    try:
        image = images.open_image(name)
        # the same limit as for reference images
        small = limit_size(image, extractor.detection.max_image_size or max(image.size))
        face = first_usable(extractor.detection.detect(to_tensor([small])[0]))
    except (ImageError, OSError) as error:
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
    position = [*(round(value * scale, 2) for value in values), *map(float, image.size)]
    return position if _is_position(position) else None
