"""Where the faces of a folder of images are, in a JSON file."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from openpulid.data.captioned_images import CaptionedImages
from openpulid.errors import ImageError, PulidError, TrainingError
from openpulid.faces.face import first_usable
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size
from openpulid.training.checkpointing import write_text
from openpulid.training.distributed import DistributedContext

logger = logging.getLogger(__name__)

SAVE_SECONDS = 300
"""Time between two saves of the index while faces are detected."""
POLL_SECONDS = 10
"""Time between two reads of the index while another process detects faces."""
POSITION_LENGTH = 16

Position = list[float]
"""Box (4) and landmarks (10) of the largest face of an image in pixels, the image's width and
height."""


class IndexedImage(NamedTuple):
    """An image in the index.

    Attributes:
        version: see `CaptionedImages.find_version`.
        position: where its face is; None without a face.
    """

    version: int
    position: Position | None


def build_index(
    images: CaptionedImages,
    index: Path,
    extractor: PhotoExtractor,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Position | None]:
    """Detect the faces of all images that are not in the index yet.

    The index is saved from time to time, because a large folder takes hours.

    Args:
        images: the images.
        index: JSON file that stores where the faces are; created and completed as needed.
        extractor: detects the faces.
        on_progress: called with the numbers of indexed images and of all images.

    Returns:
        Image name -> where its face is; None without a face.

    Raises:
        TrainingError: the index is damaged or cannot be written.
    """
    versions = find_versions(images)
    indexed = read_index(index)
    is_complete = indexed.keys() == versions.keys()
    saved_at = time.monotonic()
    for count, (name, version) in enumerate(versions.items(), 1):
        if name not in indexed:
            indexed[name] = IndexedImage(version, _locate_face(images, name, extractor))
        if on_progress:
            on_progress(count, len(versions))
        is_save_due = count == len(versions) or time.monotonic() - saved_at > SAVE_SECONDS
        if is_save_due and not is_complete:
            write_text(index, json.dumps(indexed))
            saved_at = time.monotonic()
    return {name: image.position for name, image in indexed.items()}


def check_face_models(file: Path, models: Mapping[str, str], ranks: DistributedContext) -> None:
    """Check that a run has always had the same face models, and store them when it begins.

    Positions of faces and features of other models would be mixed.

    Args:
        file: JSON file in the run directory.
        models: see `PhotoExtractor.models`.
        ranks: the processes of the run, which all call this; the first one has locked the
            directory.

    Raises:
        TrainingError: the run began with other models, or the file is damaged or cannot be written.
    """
    if ranks.rank == 0 and not file.exists():
        write_text(file, json.dumps(dict(models)))
    ranks.barrier()  # a new directory and its file are the first process's work
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise TrainingError(
            f"{file} is damaged: delete it if --faces is the same as before, or start again with "
            "--fresh."
        )
    if stored != dict(models):
        raise TrainingError(
            f"{file.parent} is a run with other face models: use the same --faces, choose another "
            "run directory, or start again with --fresh."
        )


def drop_outdated(images: CaptionedImages, index: Path) -> None:
    """Remove images from the index that have changed since, or no longer exist.

    Raises:
        TrainingError: the index is damaged or cannot be written.
    """
    versions = find_versions(images)
    stored = read_index(index)
    current = {name: image for name, image in stored.items() if versions.get(name) == image.version}
    if current != stored:
        write_text(index, json.dumps(current))


def find_versions(images: CaptionedImages) -> dict[str, int]:
    """Return the version of each image, see `CaptionedImages.find_version`."""
    return {name: images.find_version(name) for name in images.captions}


def wait_for_index(names: Sequence[str], index: Path) -> dict[str, Position | None]:
    """Wait for the first process to index all images.

    The file is polled, because a barrier fails after a timeout and indexing can take hours.

    Returns:
        See `build_index`.
    """
    indexed = read_index(index)
    while not set(names) <= set(indexed):
        time.sleep(POLL_SECONDS)
        indexed = read_index(index)
    return {name: image.position for name, image in indexed.items()}


def read_index(index: Path) -> dict[str, IndexedImage]:
    """Read an index; empty if there is none.

    Raises:
        TrainingError: the file is damaged.
    """
    if not index.is_file():
        return {}
    try:
        images = {name: IndexedImage(*x) for name, x in json.loads(index.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        images = None
    if images is None or not all(map(_is_valid, images.values())):
        raise TrainingError(
            f"{index} is damaged: delete it, and faces are detected again."
        ) from None
    return images


def _is_valid(image: IndexedImage) -> bool:
    is_position = image.position is None or _is_position(image.position)
    return type(image.version) is int and is_position


def _is_position(value: object) -> bool:
    """Return whether a value of an index is a box, five landmarks and a size."""
    if not isinstance(value, list) or len(value) != POSITION_LENGTH:
        return False
    return all(type(number) in (int, float) and math.isfinite(number) for number in value)


def _locate_face(images: CaptionedImages, name: str, extractor: PhotoExtractor) -> Position | None:
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
