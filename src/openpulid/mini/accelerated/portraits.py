"""Training batches of PuLID from the rendered world, without leaving the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openpulid.identity.extractor import MiniExtractor
from openpulid.mini.accelerated.train_set import TrainSet
from openpulid.mini.accelerated.world import World
from openpulid.training import StepRNG
from openpulid.training.pulid import Batch


class DevicePortraits:
    """A `BatchSource` whose features come from another image, a portrait of the same person.

    Args:
        world: the images.
        data: their latents and captions, row by row.
        extractor: extracts the features.
        portraits: number of portraits per person, the last images of each; at least 2.
        batch_size: images per step.
    """

    def __init__(
        self,
        world: World,
        data: TrainSet,
        extractor: MiniExtractor,
        portraits: int,
        batch_size: int,
    ) -> None:
        self.world = world
        self.data = data
        self.extractor = extractor
        self.portraits = portraits
        self.batch_size = batch_size

    @torch.no_grad()
    def batch(self, rng: StepRNG) -> Batch:
        """Return a random batch. The prompts are caption numbers, see `DeviceModel`."""
        data = self.data
        device = data.latents.device
        rows = rng.randint(len(data.latents), (self.batch_size,), "rows").to(device)
        captions = data.tokens.shape[1]
        variants = rng.randint(captions, (self.batch_size,), "variants").to(device)
        prompts: Any = list((rows * captions + variants).unbind())

        portrait_rows = self._other_portraits(rows, rng)
        id_cond, hidden = self.extractor.extract_batch(*self.world.rows(portrait_rows))
        return Batch(
            data.latents[rows].float(),
            data.faces[rows].float(),
            prompts,
            id_cond,
            [level.float() for level in hidden],
            self.world.rows(rows)[0],
            self.world.landmarks[rows] / self.world.images.shape[-1],
            people=rows // self.world.per_person,
        )

    def _other_portraits(self, rows: Tensor, rng: StepRNG) -> Tensor:
        """Sample for each image a portrait of the same person, never the image itself."""
        per_person = self.world.per_person
        first = rows // per_person * per_person + per_person - self.portraits
        offset = rng.randint(self.portraits, rows.shape, "mates").to(rows.device)
        next_offset = (offset + 1) % self.portraits
        return first + torch.where(first + offset == rows, next_offset, offset)
