"""W+ Adapter in training: face latents as tokens of a second attention after the text's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpulid.methods.w_plus.encoders import WPlusNetworks
from openpulid.methods.w_plus.w_plus import WPlusAdapter
from openpulid.mini.train.baselines.base import Baseline, draw_uniform
from openpulid.mini.train.baselines.tensors import save_half
from openpulid.training import StepRNG
from openpulid.training.pulid import Batch, DiffusionStep, drop_captions, drop_identity
from openpulid.training.w_plus import WPlusLoss, disturb_latents

NO_CAPTION_WITH_IDENTITY = 1 / 18
"""Probability that an image with an identity has no caption: 5 % of all, as 90 % have one."""


class WPlusBaseline(Baseline):
    """W+ Adapter (arXiv 2311.17461).

    **Both stages of the authors train together in one run.** In the first one they train
    everything with L_diff. In the second one the projection is frozen, and the losses of
    disentanglement and preservation are added, which compare with predictions for disturbed latents
    of other people and without an identity. Here half of the steps are of the first kind and half
    of the second. The authors use other images in the second stage; here there is one set of
    images.

    Args:
        method: attached by `BaselineTask`.
        directions: (E, 18, W) editing directions that disturb latents, see `disturb_latents`.
    """

    method: WPlusAdapter

    def __init__(self, method: WPlusAdapter, directions: Tensor) -> None:
        super().__init__(method, method.networks)
        self.directions = directions
        self.loss = WPlusLoss()

    def use(
        self, batch: Batch, pipe: Any, rng: StepRNG | None = None
    ) -> AbstractContextManager[Any]:
        """Open the method; a step of the second stage has no gradient in the projection."""
        tokens = self.method.encode(self.identities(batch))
        if rng is not None and _is_second_stage(rng):
            tokens = tokens.detach()
        return self.method.use_tokens(tokens, pipe=pipe)

    def drop(self, batch: Batch, dropped: Tensor, rng: StepRNG) -> Batch:
        """Drop identities where `dropped` (B,) is true, half of them with their caption.

        As many images lose their caption alone: the authors drop 5 % each of identities, captions
        and both. The latents of a dropped identity are zero.
        """
        probability = torch.where(dropped, 0.5, NO_CAPTION_WITH_IDENTITY)
        has_no_caption = rng.rand(dropped.shape, "drop_captions") < probability
        return drop_captions(drop_identity(batch, dropped), has_no_caption)

    def comparisons(self, batch: Batch, rng: StepRNG) -> Sequence[Batch | None]:
        """Return the batch with disturbed latents of other people, and None for no identity."""
        if not _is_second_stage(rng):
            return ()
        latents = batch.id_cond.unflatten(1, self.directions.shape[1:])
        disturbed = disturb_latents(latents, rng.generator("disturbance"), self.directions)
        return (batch._replace(id_cond=disturbed.flatten(1)), None)

    def comparison_losses(
        self, step: DiffusionStep, others: Sequence[DiffusionStep], batch: Batch
    ) -> Mapping[str, Tensor]:
        """Compute disentanglement and preservation, with the default weights of the authors' code.

        They compare predictions of the velocity, which the miniature's base model has, where the
        authors compare predictions of the noise. L_diff is that of all baselines.
        """
        if not others:
            return {}
        disturbed, base = others
        assert batch.masks is not None
        parts = self.loss.parts(
            step.output, step.target, disturbed.output, base.output, batch.masks
        )
        return {
            "disentanglement": self.loss.disentanglement * parts["disen"],
            "preservation": self.loss.preservation * parts["preserve"],
        }

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the projection and the layers."""
        return save_half(self.method.networks.state_dict(), path)


def w_plus(pipe: Any, directions: Tensor) -> Baseline:
    """Create W+ Adapter, whose queries, keys and values start as copies of the text's.

    Args:
        pipe: the miniature's pipeline.
        directions: (E, 18, W) editing directions of the latents.
    """
    networks = WPlusNetworks.for_unet(pipe.unet, directions.shape[-1])
    return WPlusBaseline(WPlusAdapter(networks), directions)


def _is_second_stage(rng: StepRNG) -> bool:
    return draw_uniform(rng, "stage") >= 0.5
