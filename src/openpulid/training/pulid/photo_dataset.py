"""Photos to train on: a folder of images with captions."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.errors import ImageError, TrainingError
from openpulid.faces.face import Face
from openpulid.identity.detection import LONGEST, MIN_FACE
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size, open_image
from openpulid.training.checkpointing import write_text
from openpulid.training.distributed import DistributedContext
from openpulid.training.pulid.batch import Batch
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.rng import StepRNG

logger = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tiff"}
INDEX = "faces.json"
SAVE_SECONDS = 300
"""Time between two saves of the index while faces are detected."""
POLL_SECONDS = 10
"""Time between two reads of the index while another process detects faces."""

FaceIndex = dict[str, list[float] | None]
"""Image name -> box (4) and landmarks (10) of its largest face in pixels; None without a face."""


class PhotoDataset:
    """A `BatchSource` of square crops of photos, with captions and the features of each face.

    Faces are detected once and their positions stored. Features and latents are computed on the
    fly, because those of a large collection do not fit on a disk.

    Args:
        folder: of the images.
        names: images in `folder` with a face and a caption (`NAME.txt` for `NAME.jpg`).
        faces: (N, 14) box (4) and landmarks (10) of each face, in pixels of its image.
        model: whose VAE computes the latents.
        extractor: extracts the identities.
        batch_size: images per step, over all processes.
        pixels: width and height of the crops.
        with_images: whether batches contain the images, for an ID loss.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        faces: np.ndarray,
        model: SDXLModel,
        extractor: PhotoExtractor,
        batch_size: int,
        pixels: int,
        with_images: bool = True,
    ) -> None:
        self.folder = folder
        self.names = list(names)
        self.faces = faces
        self.model = model
        self.extractor = extractor
        self.batch_size = batch_size
        self.pixels = pixels
        self.with_images = with_images

    @classmethod
    def open(
        cls,
        folder: Path,
        index: Path,
        model: SDXLModel,
        extractor: PhotoExtractor,
        batch_size: int,
        pixels: int,
        with_images: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PhotoDataset:
        """Open the images of a folder that have a caption and a face of at least `MIN_FACE` pixels.

        Args:
            folder: of the images, at any depth.
            index: JSON file that stores where the faces are; created and completed as needed.
            model: see the class.
            extractor: see the class.
            batch_size: see the class.
            pixels: see the class.
            with_images: see the class.
            on_progress: called with the numbers of indexed images and of all images.

        Raises:
            TrainingError: there is no such image, or the index is damaged.
        """
        names = sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.with_suffix(".txt").is_file()
        )
        if DistributedContext(model.device).rank == 0:
            positions = _build_index(folder, names, index, extractor, on_progress)
        else:
            positions = _wait_for_index(names, index)
        faces: dict[str, list[float]] = {}
        for name in names:
            position = positions[name]
            if position is not None and _face_size(position) >= MIN_FACE:
                faces[name] = position
        if not faces:
            raise TrainingError(
                f"{folder}: none of {len(names)} images with a caption shows a face of at least "
                f"{MIN_FACE} pixels. Each NAME.jpg needs a caption in NAME.txt."
            )
        if len(faces) < len(names):
            logger.warning(
                "%s: skipping %d of %d images without a face of at least %d pixels",
                folder,
                len(names) - len(faces),
                len(names),
                MIN_FACE,
            )
        boxes = np.array(list(faces.values()), np.float32)
        return cls(folder, list(faces), boxes, model, extractor, batch_size, pixels, with_images)

    def __len__(self) -> int:
        return len(self.names)

    @torch.no_grad()
    def batch(self, rng: StepRNG) -> Batch:
        """Return the rank's part of the global batch.

        The crop of an image is always the same: the largest square, as close to its face as
            possible.
        """
        rows: list[int] = []
        crops: list[Tensor] = []
        faces: list[Face] = []
        for index in rng.indices(len(self), self.batch_size).tolist():
            row, crop, face = self._read(index)
            rows.append(row)
            crops.append(crop)
            faces.append(face)
        images = torch.stack(crops).to(self.model.device)
        latents = self.model.encode(images)
        identities = self.extractor.extract(faces)
        levels = zip(*(identity.hidden for identity in identities), strict=True)
        return Batch(
            latents=latents,
            masks=_face_masks(faces, self.pixels, latents.shape[-1]).to(latents.device),
            prompts=[self._caption(row) for row in rows],
            id_cond=torch.cat([identity.id_cond[:, 0] for identity in identities]),
            hidden=[torch.cat(level) for level in levels],
            images=images if self.with_images else None,
        )

    def _caption(self, row: int) -> str:
        file = (self.folder / self.names[row]).with_suffix(".txt")
        # an invalid byte in one of a million files must not stop the training
        return file.read_text("utf-8", errors="replace").strip()

    def _read(self, row: int) -> tuple[int, Tensor, Face]:
        """Read a row's crop and face, or those of the next readable row.

        Files can change during a run, and a resumed run would stop at the same file again.
        """
        for offset in range(len(self)):
            candidate = (row + offset) % len(self)
            try:
                crop, face = self._crop(candidate)
                return candidate, crop, face
            except ImageError as error:
                logger.warning("%s; using the next image instead", error)
        raise TrainingError(f"{self.folder}: no image can be read any more: check the folder.")

    def _crop(self, row: int) -> tuple[Tensor, Face]:
        """Return the crop (3, pixels, pixels) in [0, 1], and the face in its coordinates."""
        image = open_image(self.folder / self.names[row])
        box = self.faces[row, :4]
        landmarks = self.faces[row, 4:].reshape(5, 2)
        side = min(image.size)
        center = (box[:2] + box[2:]) / 2
        corner = np.clip(center - side / 2, 0, np.array(image.size) - side).round().astype(int)
        square = image.crop((*corner, *(corner + side)))
        square = square.resize((self.pixels, self.pixels), Image.Resampling.LANCZOS)
        crop = to_tensor([square])[0]
        scale = self.pixels / side
        crop_box = torch.from_numpy((box.reshape(2, 2) - corner) * scale).flatten().float()
        crop_landmarks = torch.from_numpy((landmarks - corner) * scale).float()
        return crop, Face(crop, crop_box, crop_landmarks, 1.0)


def _build_index(
    folder: Path,
    names: Sequence[str],
    index: Path,
    extractor: PhotoExtractor,
    on_progress: Callable[[int, int], None] | None,
) -> FaceIndex:
    """Detect the faces of all images that are not in the index yet.

    The index is saved from time to time, because a large folder takes hours.
    """
    positions = _read_index(index)
    index.parent.mkdir(parents=True, exist_ok=True)
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


def _wait_for_index(names: Sequence[str], index: Path) -> FaceIndex:
    """Wait for the first process to index all images.

    The file is polled, because a barrier fails after a timeout and indexing can take hours.
    """
    positions = _read_index(index)
    while not set(names) <= set(positions):
        time.sleep(POLL_SECONDS)
        positions = _read_index(index)
    return positions


def _read_index(index: Path) -> FaceIndex:
    if not index.is_file():
        return {}
    try:
        positions: FaceIndex = json.loads(index.read_text("utf-8"))
    except json.JSONDecodeError:
        raise TrainingError(
            f"{index} is damaged: delete it, and faces are detected again."
        ) from None
    return positions


def _locate_face(path: Path, extractor: PhotoExtractor) -> list[float] | None:
    """Return box and landmarks of the largest face.

    None without an upright face or a readable image: a base model would learn a turned image.
    """
    try:
        image = open_image(path)
    except ImageError as error:
        logger.warning("%s", error)
        return None
    small = limit_size(image, LONGEST)  # the same limit as for reference images
    faces = extractor.detection.detect(to_tensor([small])[0])
    if not faces:
        return None
    if faces[0].turns or "tilted" in faces[0].defects:
        logger.warning("%s: the face is not upright, so the image is not used; turn it.", path)
        return None
    scale = max(image.size) / max(small.size)
    values = (*faces[0].box.tolist(), *faces[0].landmarks.flatten().tolist())
    return [round(value * scale, 2) for value in values]


def _face_size(position: Sequence[float]) -> float:
    """Return the shorter side of a face's box."""
    x1, y1, x2, y2 = position[:4]
    return min(x2 - x1, y2 - y1)


def _face_masks(faces: Sequence[Face], pixels: int, side: int) -> Tensor:
    """Return the fraction of each latent position inside the face's box, (B, 1, side, side)."""
    masks = torch.zeros(len(faces), 1, pixels, pixels)
    for mask, face in zip(masks, faces, strict=True):
        x1, y1, x2, y2 = (int(v) for v in face.box.round())
        mask[:, max(y1, 0) : y2, max(x1, 0) : x2] = 1
    return interpolate(masks, (side, side), mode="area")
