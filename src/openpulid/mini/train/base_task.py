"""Training of the miniature's text-to-image bases on cached latents.

There is no identity conditioning. The face covers a third of an image and is its hardest part, so
it has a higher weight in the loss. The evaluation generates images for prompts of held-out scenes
and recognizes the attributes in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.mini.data import Captions, Latents
from openpulid.mini.evaluation.image_evaluator import ImageEvaluator
from openpulid.mini.train.networks import CAPTION_DROPOUT, BaseNetwork
from openpulid.training import StepRNG
from openpulid.training.pulid import DiffusionLoss, DiffusionStep

PAIR_INTERVAL = 8
"""Every eighth training step is one of pairs of people."""


@dataclass(frozen=True)
class TrainingImages:
    """Images of one size.

    Attributes:
        latents: their latents.
        captions: their captions.
    """

    latents: Latents
    captions: Captions


class BaseTask:
    """Trains a base model; a `training.trainer.Task`.

    Args:
        network: the network.
        images: the training images, of one person each.
        pairs: wide images of two people; None for none.
        evaluator: of a pipeline with this network; None disables validation.
        batch: images per step, and of pairs half of that.
        face_weight: weight of the face relative to the other pixels.
    """

    def __init__(
        self,
        network: BaseNetwork,
        images: TrainingImages,
        pairs: TrainingImages | None = None,
        evaluator: ImageEvaluator | None = None,
        batch: int = 64,
        face_weight: float = 3.0,
    ) -> None:
        self.network = network
        self.images = images
        self.pairs = pairs
        self.evaluator = evaluator
        self.batch = batch
        self.loss = DiffusionLoss(network.schedule, face_weight=face_weight)

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the modules of the network that train."""
        return self.network.modules()

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the diffusion loss of a random batch."""
        network, schedule = self.network, self.network.schedule
        device = next(next(iter(self.modules().values())).parameters()).device
        images, batch = self.images, self.batch
        if self.pairs is not None and rng.step % PAIR_INTERVAL == PAIR_INTERVAL - 1:
            images, batch = self.pairs, self.batch // 2
        latents, captions = images.latents, images.captions
        rows = rng.indices(len(latents.images), batch)
        clean, face_masks = latents.rows(rows, device)
        variants = rng.randint(captions.tokens.shape[1], rows.shape, "variants")
        has_caption = rng.rand(rows.shape, "drop") >= CAPTION_DROPOUT
        tokens = captions.rows(rows, variants)
        text = network.encode_text(tokens.to(device), has_caption.to(device), *clean.shape[-2:])
        noise = rng.randn(clean.shape, "noise").to(device)
        # Stratified: one number from each of B equal intervals. The loss varies less than with B
        # independent numbers.
        uniform = (torch.arange(len(rows)) + rng.rand(rows.shape, "time")) / len(rows)
        t = network.sample_timesteps(uniform).to(device)
        x_t = schedule.add_noise(clean, noise, t)
        step = DiffusionStep(
            network.predict(x_t, t, text), schedule.target(clean, noise, t), x_t, t
        )
        return {
            "diffusion": (self.loss.per_sample(step, face_masks) * network.loss_weight(t)).mean()
        }

    def validate(self) -> Mapping[str, float]:
        """Evaluate the base on all prompts."""
        return self.evaluator.evaluate() if self.evaluator else {}

    def sheet(self) -> Image.Image | None:
        """Draw images of the evaluation."""
        return self.evaluator.draw_sheet() if self.evaluator else None
