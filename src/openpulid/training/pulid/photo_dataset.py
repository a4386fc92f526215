"""Photographs to train on: a folder of pictures, each with its sentence beside it."""

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
from openpulid.faces.scrfd import LONGEST
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size, open_image
from openpulid.training.checkpointing import write_text
from openpulid.training.distributed import DistributedContext
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.task import Batch
from openpulid.training.rng import StepRNG

logger = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tiff"}
INDEX = "faces.json"
SAVE_SECONDS, WATCH_SECONDS = 300, 10
LEAST_FACE = 64
"""Pixels of a face that is worth learning: the recogniser reads it at 112, the tower at 336."""


class PhotoDataset:
    """A `training.task.Source`: squares of photographs, the face in each, its features, and their sentences.

    Where faces are is found once and kept; features and latents are computed as they are needed, because those of a large
    collection fit no disk.

    Args:
        names: pictures in `folder` with a face, and where their sentences are (`NAME.txt` beside each).
        faces: for each the box (4) and the landmarks (10) in pixels of the picture.
        base: whose autoencoder makes the latents.
        features: reads the faces.
        batch: pictures per step, over all processes.
        pixels: width and height of the squares.
        seen: whether the pictures themselves are wanted too, for an ID loss.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        faces: np.ndarray,
        base: SDXLModel,
        features: PhotoExtractor,
        batch: int,
        pixels: int,
        seen: bool = True,
    ) -> None:
        self.folder, self.names, self.faces = folder, list(names), faces
        self.base, self.features, self.size, self.pixels, self.seen = (
            base,
            features,
            batch,
            pixels,
            seen,
        )

    @classmethod
    def open(
        cls,
        folder: Path,
        index: Path,
        base: SDXLModel,
        features: PhotoExtractor,
        batch: int,
        pixels: int,
        seen: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PhotoDataset:
        """The pictures of a folder that have a sentence and show a face of `LEAST_FACE` pixels; `index` remembers where.

        Raises:
            TrainingError: there is none, or the index is damaged.
        """
        names = sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.with_suffix(".txt").is_file()
        )
        if DistributedContext(base.device).rank == 0:
            known = _indexed(folder, names, index, features, on_progress)
        else:
            known = _awaited(names, index)
        found = {
            name: place for name in names if (place := known[name]) and _width(place) >= LEAST_FACE
        }
        if not found:
            raise TrainingError(
                f"{folder}: none of {len(names)} pictures with a sentence shows a face of {LEAST_FACE} pixels; put NAME.txt "
                "beside NAME.jpg."
            )
        if left := len(names) - len(found):
            said = "%s: %d of %d pictures are left out, they show no face of %d pixels"
            logger.warning(said, folder, left, len(names), LEAST_FACE)
        return cls(
            folder,
            list(found),
            np.array(list(found.values()), np.float32),
            base,
            features,
            batch,
            pixels,
            seen,
        )

    def __len__(self) -> int:
        return len(self.names)

    @torch.no_grad()
    def batch(self, draw: StepRNG) -> Batch:
        """The rank's part of the global batch; always the same square of a picture, the one nearest around its face."""
        rows, squares, faces = zip(
            *map(self._readable, draw.indices(len(self), self.size).tolist()), strict=True
        )
        pictures = torch.stack(squares).to(self.base.device)
        latents = self.base.encode(pictures)
        identities = self.features.identities(faces)
        return Batch(
            latents=latents,
            masks=_masks(faces, self.pixels, latents.shape[-1]).to(latents.device),
            prompts=[self._sentence(row) for row in rows],
            id_cond=torch.cat([identity.id_cond[:, 0] for identity in identities]),
            hidden=[
                torch.cat(level)
                for level in zip(*(identity.hidden for identity in identities), strict=True)
            ],
            pictures=pictures if self.seen else None,
        )

    def _sentence(self, row: int) -> str:
        file = (self.folder / self.names[row]).with_suffix(".txt")
        return file.read_text(
            "utf-8", errors="replace"
        ).strip()  # one odd letter of a million files stops no training

    def _readable(self, row: int) -> tuple[int, Tensor, Face]:
        """A row's square and face, or the next row's that can be read: files change, and a resumed run would meet the same
        one again."""
        for later in range(len(self)):
            place = (row + later) % len(self)
            try:
                return place, *self._square(place)
            except ImageError as error:
                logger.warning("%s; the next picture takes its place", error)
        raise TrainingError(f"{self.folder}: no picture can be read any more.")

    def _square(self, row: int) -> tuple[Tensor, Face]:
        """(3, pixels, pixels) in [0, 1], and the face in it."""
        image = open_image(self.folder / self.names[row])
        box, five = self.faces[row, :4], self.faces[row, 4:].reshape(5, 2)
        side = min(image.size)
        centre = (box[:2] + box[2:]) / 2
        corner = np.clip(centre - side / 2, 0, np.array(image.size) - side).round().astype(int)
        crop = image.crop((*corner, *(corner + side))).resize(
            (self.pixels, self.pixels), Image.Resampling.LANCZOS
        )
        square = to_tensor([crop])[0]
        scale = self.pixels / side
        placed = torch.from_numpy((box.reshape(2, 2) - corner) * scale).flatten().float()
        return square, Face(square, placed, torch.from_numpy((five - corner) * scale).float(), 1.0)


def _indexed(
    folder: Path,
    names: Sequence[str],
    index: Path,
    features: PhotoExtractor,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, list[float] | None]:
    """Where the face of each picture is; found once, and written down from time to time: a large folder takes hours."""
    known = _read(index)
    index.parent.mkdir(parents=True, exist_ok=True)
    written = time.monotonic()
    unknown = len([name for name in names if name not in known])
    for done, name in enumerate(names, 1):
        if name not in known:
            known[name] = _where(folder / name, features)
        if on_progress:
            on_progress(done, len(names))
        if unknown and (done == len(names) or time.monotonic() - written > SAVE_SECONDS):
            write_text(index, json.dumps(known))
            written = time.monotonic()
    return known


def _awaited(names: Sequence[str], index: Path) -> dict[str, list[float] | None]:
    """What the first process finds. The file is watched: those who wait for hours at a barrier are taken for dead."""
    while not set(names) <= set(known := _read(index)):
        time.sleep(WATCH_SECONDS)
    return known


def _read(index: Path) -> dict[str, list[float] | None]:
    try:
        known: dict[str, list[float] | None] = (
            json.loads(index.read_text("utf-8")) if index.is_file() else {}
        )
    except json.JSONDecodeError:
        raise TrainingError(
            f"{index} is damaged; delete it, and the faces are looked for again."
        ) from None
    return known


def _where(path: Path, features: PhotoExtractor) -> list[float] | None:
    """Box and landmarks of the largest face of a picture; None without one, or where the file is no picture."""
    try:
        image = open_image(path)
    except ImageError as error:
        logger.warning("%s", error)
        return None
    small = limit_size(image, LONGEST)  # as a photo is read when somebody is shown
    faces, scale = features.detect(to_tensor([small])[0]), max(image.size) / max(small.size)
    if not faces:
        return None
    return [
        round(v * scale, 2)
        for v in (*faces[0].box.tolist(), *faces[0].landmarks.flatten().tolist())
    ]


def _width(place: Sequence[float]) -> float:
    """The shorter side of a face's box."""
    return min(place[2] - place[0], place[3] - place[1])


def _masks(faces: Sequence[Face], pixels: int, side: int) -> Tensor:
    """(B, 1, side, side): the share of each latent position that is in the face's box."""
    masks = torch.zeros(len(faces), 1, pixels, pixels)
    for mask, face in zip(masks, faces, strict=True):
        x1, y1, x2, y2 = (int(v) for v in face.box.round())
        mask[:, max(y1, 0) : y2, max(x1, 0) : x2] = 1
    return interpolate(masks, (side, side), mode="area")
