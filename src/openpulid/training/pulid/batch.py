"""Batches of training images with the features of the people in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from openpulid.training.rng import StepRNG


class Batch(NamedTuple):
    """B images and the people in them.

    Features are of the face cropped from the image itself (PuLID, section 3.2), or of another image
    of the same person.

    Attributes:
        latents: (B, c, h, w), as the base model expects them.
        masks: (B, 1, h, w), 1 inside the face; None weighs all positions alike.
        prompts: B captions.
        id_cond: (B, C) face embedding and image embedding.
        hidden: five levels of vision features, (B, 1 + N, D) each.
        images: (B, 3, H, W) in [0, 1], the targets of an ID loss; None without one.
        landmarks: (B, 5, 2) from 0 to 1 across the image, for methods that are conditioned on them.
        references: (B, 3, H, W) in [0, 1], the other images that the features are of; None if they
            are of the images themselves, or are not needed.
        people: (B,) number of the person in each image; None if every image shows another one.
    """

    latents: Tensor
    masks: Tensor | None
    prompts: Sequence[str]
    id_cond: Tensor
    hidden: Sequence[Tensor]
    images: Tensor | None = None
    landmarks: Tensor | None = None
    references: Tensor | None = None
    people: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Move all tensors to a device."""
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**moved, hidden=[level.to(device) for level in self.hidden])

    def subset(self, count: int) -> Batch:
        """Select `count` evenly spaced samples.

        The parts of several processes together select what a single process selects.
        """
        rows = evenly_spaced(len(self.latents), count)
        selected: dict[str, Any] = {
            name: x[rows] for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(
            **selected,
            prompts=[self.prompts[k] for k in rows],
            hidden=[level[rows] for level in self.hidden],
        )


class BatchSource(Protocol):
    """A dataset that returns batches of its own size, with all random numbers from `rng`."""

    def batch(self, rng: StepRNG) -> Batch:
        """Return the rank's part of the step's global batch."""


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return `count` of `length` indices at equal distances from 0 on, or all of them.

    Selecting from equal parts of the whole gives the same samples as selecting from the whole.
    """
    count = min(count, length)
    return [k * length // count for k in range(count)]


def drop_identity(batch: Batch, dropped: Tensor) -> Batch:
    """Set all features to zero where `dropped` (B,) is true, as for an unconditional identity."""
    keep = (~dropped).to(batch.id_cond)
    hidden = [level * keep[:, None, None].to(level) for level in batch.hidden]
    return batch._replace(id_cond=batch.id_cond * keep[:, None], hidden=hidden)


def drop_captions(batch: Batch, dropped: Tensor) -> Batch:
    """Replace the prompt by an empty one where `dropped` (B,) is true."""
    prompts = ["" if drop else prompt for prompt, drop in zip(batch.prompts, dropped, strict=True)]
    return batch._replace(prompts=prompts)


def swap_identities(batch: Batch) -> Batch | None:
    """Give every image the identity of the previous one that shows another person.

    Returns:
        The batch with other identities, or None if all its images show the same person.
    """
    count = len(batch.id_cond)
    people = list(range(count)) if batch.people is None else batch.people.tolist()
    if len(set(people)) == 1:
        return None
    previous = [[(row - offset) % count for offset in range(1, count)] for row in range(count)]
    rows = [
        next(other for other in others if people[other] != person)
        for person, others in zip(people, previous, strict=True)
    ]
    return batch._replace(id_cond=batch.id_cond[rows], hidden=[h[rows] for h in batch.hidden])


def loss_weight_map(batch: Batch, landmark_weight: float) -> Tensor | None:
    """Return the face masks, weighted around eyes, nose and corners of the mouth.

    Skin and outline are most of a face's area and nearly all of its loss, but a few positions of
    the latents determine the identity.

    Args:
        batch: with or without masks and landmarks.
        landmark_weight: factor of the mask at a landmark; 1 returns the masks unchanged.

    Returns:
        (B, 1, h, w), or None without masks.
    """
    if batch.masks is None or batch.landmarks is None or landmark_weight == 1.0:
        return batch.masks
    height, width = batch.masks.shape[-2:]
    landmarks = batch.landmarks.float()
    ys = (torch.arange(height, device=landmarks.device) + 0.5) / height
    xs = (torch.arange(width, device=landmarks.device) + 0.5) / width
    # in profile the eyes appear closer
    eye_distance = (landmarks[:, 0] - landmarks[:, 1]).norm(dim=-1).clamp(min=0.05)
    dx = xs[None, None, None] - landmarks[..., 0, None, None]
    dy = ys[:, None] - landmarks[..., 1, None, None]
    squared_distance = dx.square() + dy.square()  # (B, 5, h, w)
    sigma = 0.35 * eye_distance[:, None, None, None]
    nearness = torch.exp(-squared_distance / (2 * sigma.square())).amax(1, keepdim=True)
    return batch.masks * (1.0 + (landmark_weight - 1.0) * nearness.to(batch.masks))
