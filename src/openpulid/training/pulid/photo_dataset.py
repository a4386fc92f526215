"""Photos to train on: a folder of images with captions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.data.captioned_images import TrainingImages, find_captioned_images
from openpulid.data.prepared_images import PreparedImages, is_prepared
from openpulid.data.shards import TRAIN
from openpulid.errors import FaceError, ImageError, TrainingError
from openpulid.faces.face import Face
from openpulid.identity.detection import MIN_FACE
from openpulid.identity.identity import Identity
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.io.image_grid import to_tensor
from openpulid.training.distributed import DistributedContext
from openpulid.training.pulid.batch import Batch
from openpulid.training.pulid.buckets import Buckets, Size, list_sizes
from openpulid.training.pulid.face_index import build_index, drop_outdated, wait_for_index
from openpulid.training.pulid.models import BaseModel
from openpulid.training.rng import StepRNG

logger = logging.getLogger(__name__)

INDEX = "faces.json"
MIN_EYE_DISTANCE = 4
"""Pixels between the eyes below which landmarks say nothing; in profile they are close."""


class PhotoSample(NamedTuple):
    """A photo of a batch: row, caption, crop (3, H, W), its face and the identity of the face."""

    row: int
    prompt: str
    crop: Tensor
    face: Face
    identity: Identity


class PhotoDataset:
    """A `BatchSource` of crops of photos, with captions and the features of each face.

    Faces are detected once and their positions stored. Features and latents are computed on the
    fly, because those of a large collection do not fit on a disk.

    Args:
        images: the images.
        names: which of them are used.
        faces: (N, 16) box (4) and landmarks (10) of each face in pixels of its image, and the
            image's width and height.
        model: whose VAE computes the latents.
        extractor: extracts the identities.
        batch_size: images per step, over all processes.
        pixels: width and height of the crops; with buckets, that of a square of the same area.
        with_images: whether batches contain the images, for an ID loss.
        paired: take the features from another image of the same person, that is of the same
            folder. A person with a single image keeps it.
        has_buckets: crop to several aspect ratios instead of squares.

    Raises:
        TrainingError: paired, and no person has two images.
    """

    def __init__(
        self,
        images: TrainingImages,
        names: Sequence[str],
        faces: np.ndarray,
        model: BaseModel,
        extractor: PhotoExtractor,
        batch_size: int,
        pixels: int,
        with_images: bool = True,
        paired: bool = False,
        has_buckets: bool = False,
    ) -> None:
        self.images = images
        self.names = list(names)
        self.faces = faces
        self.model = model
        self.extractor = extractor
        self.batch_size = batch_size
        self.pixels = pixels
        self.with_images = with_images
        self.people = number_people(images, self.names)
        self.others = find_others(self.people, images.folder) if paired else None
        self.buckets = None
        if has_buckets:
            sizes = [Size(int(width), int(height)) for width, height in faces[:, 14:]]
            self.buckets = Buckets(sizes, list_sizes(pixels), batch_size)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        index: Path,
        model: BaseModel,
        extractor: PhotoExtractor,
        batch_size: int,
        pixels: int,
        with_images: bool = True,
        paired: bool = False,
        has_buckets: bool = False,
        split: str = TRAIN,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PhotoDataset:
        """Open the images of a folder that have a caption and a face of at least `MIN_FACE` pixels.

        Args:
            folder: of the images, in files or in tar archives, at any depth; or a dataset of
                `pulid data prepare`, whose faces are known, in a folder or at a URL.
            index: JSON file that stores where the faces are; created and completed as needed.
            model: see the class.
            extractor: see the class.
            batch_size: see the class.
            pixels: see the class.
            with_images: see the class.
            paired: see the class.
            has_buckets: see the class.
            split: of a prepared dataset.
            on_progress: called with the numbers of indexed images and of all images.

        Raises:
            TrainingError: there is no such image, or the index is damaged; see the class.
        """
        images: TrainingImages
        positions: Mapping[str, Sequence[float] | None]
        if is_prepared(folder):
            images = prepared = PreparedImages.open(folder, split)
            positions = dict(zip(prepared.names, prepared.faces.tolist(), strict=True))
        else:
            images = captioned = find_captioned_images(Path(folder))
            ranks = DistributedContext(model.device)
            if ranks.rank == 0:
                captioned.report()
                drop_outdated(captioned, index)
            ranks.barrier()
            if ranks.rank == 0:
                positions = build_index(captioned, index, extractor, on_progress)
            else:
                positions = wait_for_index(list(captioned.captions), index)
            positions = {name: positions[name] for name in captioned.captions}
        faces = {
            name: position
            for name, position in positions.items()
            if position is not None and _is_usable(position)
        }
        if not faces:
            raise no_images_error(folder, len(positions))
        if len(faces) < len(positions):
            logger.warning(
                "%s: skipping %d of %d images without a face of at least %d pixels",
                folder,
                len(positions) - len(faces),
                len(positions),
                MIN_FACE,
            )
        boxes = np.array(list(faces.values()), np.float32)
        return cls(
            images,
            list(faces),
            boxes,
            model,
            extractor,
            batch_size,
            pixels,
            with_images,
            paired,
            has_buckets,
        )

    @property
    def square(self) -> Size:
        """The size of square crops."""
        return Size(self.pixels, self.pixels)

    def __len__(self) -> int:
        return len(self.names)

    @torch.no_grad()
    def batch(self, rng: StepRNG) -> Batch:
        """Return the rank's part of the global batch.

        The crop of an image is always the same: the largest of its shape, as close to its face as
            possible.
        """
        if self.buckets is None:
            size, indices = self.square, rng.indices(len(self), self.batch_size)
        else:
            size, indices = self.buckets.sample(rng)
        rows = indices.tolist()
        partners = self._choose_partners(rows, rng)
        needed = [*rows, *(row for row in partners if row is not None)]
        self.images.prefetch([self.names[row] for row in needed])
        samples = [self._read(row, size) for row in rows]
        images = torch.stack([sample.crop for sample in samples]).to(self.model.device)
        latents = self.model.encode(images)
        # an image that replaces an unreadable one can show another person
        sources = [
            self._read_other(sample, partner if sample.row == row else None, size)
            for row, sample, partner in zip(rows, samples, partners, strict=True)
        ]
        identities = [source.identity for source in sources]
        levels = zip(*(identity.hidden for identity in identities), strict=True)
        faces = [sample.face for sample in samples]
        return Batch(
            latents=latents,
            masks=_face_masks(faces, size, latents.shape[-2:]).to(latents.device),
            landmarks=torch.stack([_relative_landmarks(face, size) for face in faces]).to(latents),
            prompts=[sample.prompt for sample in samples],
            id_cond=torch.cat([identity.id_cond[:, 0] for identity in identities]),
            hidden=[torch.cat(level) for level in levels],
            images=images if self.with_images else None,
            references=self._stack_references(sources),
            people=self._number_people(samples),
        )

    def _stack_references(self, sources: Sequence[PhotoSample]) -> Tensor | None:
        if self.others is None or not self.with_images:
            return None
        return torch.stack([source.crop for source in sources]).to(self.model.device)

    def _number_people(self, samples: Sequence[PhotoSample]) -> Tensor:
        # a single folder for all images says nothing about people
        numbers = self.people if any(self.people) else range(len(self))
        return torch.tensor([numbers[sample.row] for sample in samples])

    def _choose_partners(self, rows: Sequence[int], rng: StepRNG) -> list[int | None]:
        """Choose another image of the same person for each; None for the image itself."""
        if self.others is None:
            return [None] * len(rows)
        picks = rng.rand((len(rows),), "pairs").tolist()
        partners: list[int | None] = []
        for row, pick in zip(rows, picks, strict=True):
            others = self.others[row]
            partners.append(others[int(pick * len(others))] if others else None)
        return partners

    def _read_other(self, sample: PhotoSample, partner: int | None, size: Size) -> PhotoSample:
        """Read another image of the same person; an image that cannot be read is left out."""
        if partner is None:
            return sample
        try:
            return self._read_row(partner, size)
        except (FaceError, ImageError, OSError) as error:
            logger.warning("%s: %s; using the image itself", self.names[partner], error)
            return sample

    def _read(self, row: int, size: Size) -> PhotoSample:
        """Read a row, or the next one that can be read.

        Files can change during a run, and a resumed run would stop at the same file again.
        """
        for offset in range(len(self)):
            candidate = (row + offset) % len(self)
            try:
                return self._read_row(candidate, size)
            except (ImageError, OSError) as error:
                logger.warning("%s; using the next image instead", error)
            except FaceError as error:
                name = self.names[candidate]
                logger.warning("%s: %s; using the next image instead", name, error)
        folder = self.images.folder
        raise TrainingError(f"{folder}: no image can be read any more: check the folder.")

    def _read_row(self, row: int, size: Size) -> PhotoSample:
        prompt = self.images.read_caption(self.names[row])
        crop, face = self._crop(row, size)
        return PhotoSample(row, prompt, crop, face, self.extractor.extract([face])[0])

    def _crop(self, row: int, size: Size) -> tuple[Tensor, Face]:
        """Return the crop (3, height, width) in [0, 1], and the face in its coordinates."""
        name = self.names[row]
        image = self.images.open_image(name)
        box = self.faces[row, :4]
        # positions are those of a smaller image, whose sides are rounded
        if (box[2:] > 1.02 * np.array(image.size)).any():
            label = f"{self.images.folder}/{name}"
            raise ImageError(label, "is smaller than when its face was located")
        landmarks = self.faces[row, 4:14].reshape(5, 2)
        target = np.array([size.width, size.height])
        scale = (target / image.size).max()
        extent = np.minimum((target / scale).round().astype(int), image.size)
        center = (box[:2] + box[2:]) / 2
        corner = np.clip(center - extent / 2, 0, image.size - extent).round().astype(int)
        part = image.crop((*corner, *(corner + extent)))
        part = part.resize((size.width, size.height), Image.Resampling.LANCZOS)
        crop = to_tensor([part])[0]
        crop_box = torch.from_numpy((box.reshape(2, 2) - corner) * scale).flatten().float()
        crop_landmarks = torch.from_numpy((landmarks - corner) * scale).float()
        return crop, Face(crop, crop_box, crop_landmarks, 1.0)


def number_people(images: TrainingImages, names: Sequence[str]) -> list[int]:
    """Return the number of the person in each image, see `CaptionedImages.find_person`."""
    people = [images.find_person(name) or name for name in names]
    numbers = {person: number for number, person in enumerate(dict.fromkeys(people))}
    return [numbers[person] for person in people]


def find_others(people: Sequence[int], folder: str | Path) -> list[list[int]]:
    """Find the other images of each person.

    Args:
        people: number of the person in each image.
        folder: of the images, for errors.

    Returns:
        For each image the indices of the others.

    Raises:
        TrainingError: no person has two images.
    """
    groups: dict[int, list[int]] = {}
    for index, person in enumerate(people):
        groups.setdefault(person, []).append(index)
    if max(map(len, groups.values())) < 2:
        raise no_pairs_error(folder)
    num_single = sum(len(rows) == 1 for rows in groups.values())
    if num_single:
        logger.warning(
            "%s: %d of %d people have a single image, which is paired with itself",
            folder,
            num_single,
            len(groups),
        )
    return [
        [other for other in groups[person] if other != index] for index, person in enumerate(people)
    ]


def no_pairs_error(folder: str | Path) -> TrainingError:
    """Say why images cannot be paired."""
    return TrainingError(
        f"{folder}: no person has two images; put the images of each person into a folder of their "
        "own, or train without paired images."
    )


def no_images_error(folder: str | Path, num_captioned: int) -> TrainingError:
    """Say why no image of a folder can be used."""
    if not num_captioned:
        return TrainingError(
            f"{folder} has no image with a caption: each NAME.jpg needs a caption in NAME.txt."
        )
    return TrainingError(
        f"{folder}: none of {num_captioned} images with a caption shows a face of at least "
        f"{MIN_FACE} pixels."
    )


def _is_usable(position: Sequence[float]) -> bool:
    """Return whether a face is large enough, and its eyes are two points."""
    x1, y1, x2, y2, left_x, left_y, right_x, right_y = position[:8]
    eye_distance = math.hypot(right_x - left_x, right_y - left_y)
    return min(x2 - x1, y2 - y1) >= MIN_FACE and eye_distance >= MIN_EYE_DISTANCE


def _face_masks(faces: Sequence[Face], size: Size, grid: Sequence[int]) -> Tensor:
    """Return the fraction of each latent position inside the face's box, (B, 1, *grid)."""
    masks = torch.zeros(len(faces), 1, size.height, size.width)
    for mask, face in zip(masks, faces, strict=True):
        x1, y1, x2, y2 = (int(v) for v in face.box.round())
        mask[:, max(y1, 0) : y2, max(x1, 0) : x2] = 1
    return interpolate(masks, tuple(grid), mode="area")


def _relative_landmarks(face: Face, size: Size) -> Tensor:
    """Return the landmarks (5, 2) of a face in a crop, from 0 to 1 across it."""
    return face.landmarks.float() / face.landmarks.new_tensor([size.width, size.height])
