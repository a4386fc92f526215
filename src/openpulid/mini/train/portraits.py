"""Training batches from the synthetic world: latents, captions, and the features of each person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpulid.errors import TrainingError
from openpulid.identity.extractor import MiniExtractor
from openpulid.mini.data import Captions, FaceFeatures, Latents, cache_folder, load_faces
from openpulid.training import StepRNG, autocast
from openpulid.training.pulid import Batch, BatchSource
from openpulid.world import ATTRIBUTES, WorldDataset

FRONTAL_ATTRIBUTES = {"pose": "front", "glasses": "none", "style": "photo"}
"""Attributes of an image whose features are used in training. Other images hide half of the face,
and an adapter trained on them learns to rely on features only in part."""


class Portraits:
    """A `BatchSource` of images of the synthetic world.

    Args:
        data: the images.
        latents: of the same images, row by row.
        captions: of the same images.
        features: of the same images, with a method `rows` as `FaceFeatures` has it.
        tokenizer: turns caption tokens back into text.
        batch_size: images per step, over all processes.
        device: of the batches.
        with_images: whether batches contain the images that an ID loss compares with. These are
            the training images themselves: compared with another image of the person, the loss
            takes the pose, the glasses and the expression of a caption for those of another person
            and removes them (benchmarks/mini-build.md).
        paired: take the features from another, frontal image of the same person.
    """

    def __init__(
        self,
        data: WorldDataset,
        latents: Latents,
        captions: Captions,
        features: Any,
        tokenizer: Any,
        batch_size: int,
        device: torch.device | str = "cpu",
        with_images: bool = True,
        paired: bool = False,
    ) -> None:
        self.data = data
        self.latents = latents
        self.captions = captions
        self.features = features
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.device = device
        self.with_images = with_images
        self.other_views: list[Tensor] | None = None
        if paired:
            people = torch.from_numpy(np.array(data.people))
            self.other_views = list_other_views(people, torch.from_numpy(find_frontal(data)))

    @torch.no_grad()
    def batch(self, rng: StepRNG) -> Batch:
        """Return the rank's part of the step's global batch."""
        rows = rng.indices(len(self.data), self.batch_size)
        latents, masks = self.latents.rows(rows, self.device)
        prompts = self.sample_captions(rows, rng)
        feature_rows = self.sample_references(rows, rng)
        id_cond, hidden = self.features.rows(feature_rows.numpy(), self.device)

        images = None
        if self.with_images:
            images = load_faces(self.data, rows.numpy(), torch.device(self.device))[0]
        landmarks = torch.from_numpy(self.data.landmarks[rows.numpy()] / self.data.images.shape[-1])
        people = torch.from_numpy(np.asarray(self.data.people)[rows.numpy()])
        return Batch(latents, masks, prompts, id_cond, hidden, images, landmarks, people=people)

    def sample_captions(self, rows: Tensor, rng: StepRNG) -> list[str]:
        """Sample one of the captions of each row."""
        variants = rng.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        tokens = self.captions.rows(rows, variants)
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def sample_references(self, rows: Tensor, rng: StepRNG) -> Tensor:
        """Sample the image of each row's features, (B,) -> (B,)."""
        if self.other_views is None:
            return rows
        return sample_other_views(rows, self.other_views, rng)


class Mixture:
    """A `BatchSource` that takes each step from one of several sources, all equally often."""

    def __init__(self, sources: Sequence[BatchSource]) -> None:
        self.sources = sources

    def batch(self, rng: StepRNG) -> Batch:
        """Return a batch of the step's source, which is the same on all ranks."""
        index = int(torch.randint(len(self.sources), (), generator=rng.generator("source")))
        return self.sources[index].batch(rng)


def find_frontal(data: WorldDataset) -> np.ndarray:
    """Return (N,) bool: images that are suitable as reference images."""
    is_frontal = np.ones(len(data.attributes), dtype=bool)
    for name, value in FRONTAL_ATTRIBUTES.items():
        column = np.asarray(data.attributes[:, list(ATTRIBUTES).index(name)])
        is_frontal &= column == ATTRIBUTES[name].index(value)
    return is_frontal


def list_other_views(people: Tensor, is_frontal: Tensor) -> list[Tensor]:
    """List for each image the other images of the same person, in order.

    Only frontal images are listed if the person has some. An only image lists itself.

    Args:
        people: (N,) person of each image.
        is_frontal: (N,) bool.

    Returns:
        N tensors of row numbers.
    """
    order = people.argsort(stable=True)
    groups = order.split(people.unique(return_counts=True)[1].tolist())
    by_person = {int(people[group[0]]): group for group in groups}
    views = []
    for row, person in enumerate(people.tolist()):
        candidates = by_person[person]
        candidates = candidates[candidates != row]
        frontal = candidates[is_frontal[candidates]]
        if len(frontal):
            views.append(frontal)
        elif len(candidates):
            views.append(candidates)
        else:
            views.append(torch.tensor([row]))
    return views


def sample_other_views(rows: Tensor, other_views: Sequence[Tensor], rng: StepRNG) -> Tensor:
    """Sample one of the other views of each row, (B,) -> (B,)."""
    fractions = rng.rand(rows.shape, "mates")
    sampled = []
    for row, fraction in zip(rows.tolist(), fractions.tolist(), strict=True):
        views = other_views[row]
        sampled.append(int(views[int(fraction * len(views))]))
    return torch.tensor(sampled)


def load_features(extractor: MiniExtractor, data: WorldDataset, runs: Path) -> FaceFeatures:
    """Load the features of a dataset's faces from `runs`, or compute and cache them there."""
    return FaceFeatures.build(extractor, data, cache_folder(runs, "features", data.folder.name))


def open_portraits(
    runs: Path,
    name: str,
    pipe: Any,
    extractor: MiniExtractor,
    batch_size: int,
    *,
    with_images: bool,
    paired: bool,
) -> Portraits:
    """Open one dataset of the synthetic world with everything that training needs of it.

    Args:
        runs: folder of the datasets; captions, latents and features are cached there.
        name: of the dataset.
        pipe: its tokenizer and VAE.
        extractor: computes the features.
        batch_size: images per step, over all processes.
        with_images: see `Portraits`.
        paired: see `Portraits`.

    Raises:
        TrainingError: the dataset does not exist yet.
    """
    try:
        data = WorldDataset.open(runs / name)
    except FileNotFoundError as error:
        raise TrainingError(str(error)) from None
    captions = Captions.build(data, pipe.tokenizer, cache_folder(runs, "captions", name))
    with autocast(extractor.device):
        latents = Latents.build(pipe.vae, data, cache_folder(runs, "latents", name))
        features = load_features(extractor, data, runs)
    return Portraits(
        data,
        latents,
        captions,
        features,
        pipe.tokenizer,
        batch_size,
        extractor.device,
        with_images,
        paired,
    )
