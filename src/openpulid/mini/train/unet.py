"""Training of the miniature's text-to-image base: SDXL's architecture on cached latents.

There is no identity conditioning. The face covers a third of an image and is its hardest part, so
it has a higher weight in the loss. The evaluation generates images for prompts of held-out scenes
and recognizes the attributes in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn

from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.mini.data import Captions, Latents
from openpulid.mini.evaluation.image_evaluator import ImageEvaluator
from openpulid.mini.models import (
    TextEncoders,
    build_scheduler,
    predict,
)
from openpulid.training import StepRNG
from openpulid.training.pulid import DiffusionLoss, DiffusionStep

UNIFORM_SHARE = 0.25
"""Share of the training times that are distributed uniformly."""
CAPTION_DROPOUT = 0.1
"""Share of training images without their caption, for classifier-free guidance."""
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


def warp_uniform_times(uniform: Tensor) -> Tensor:
    """Map uniform numbers in [0, 1) to training times in [0, 1).

    A quarter of the times is uniform. The others are logit-normal with median 0.31. With uniform
    times half of the training would be spent where only the coarsest colors are visible through the
    noise; faces are decided below. Karras et al. (2022) and Esser et al. (2024) choose their times
    in the same way.

    Args:
        uniform: (B,) numbers.

    Returns:
        (B,) times.
    """
    quantile = ((uniform - UNIFORM_SHARE) / (1 - UNIFORM_SHARE)).clamp(1e-4, 1 - 1e-4)
    normal = -0.8 + torch.special.ndtri(quantile.double())
    times = torch.where(
        uniform < UNIFORM_SHARE, uniform / UNIFORM_SHARE, torch.sigmoid(normal).float()
    )
    return times.clamp(max=1 - 1e-6)


class BaseTask:
    """Trains the U-Net; a `training.trainer.Task`.

    Args:
        unet: from `models.pipeline.build_unet`.
        text_encoders: the frozen text encoders.
        images: the training images, of one person each.
        pairs: wide images of two people; None for none.
        evaluator: None disables validation.
        batch: images per step, and of pairs half of that.
        face_weight: weight of the face relative to the other pixels.
        gamma: losses at a signal-to-noise ratio above `gamma` - 1 are scaled down to it. The little
            noise there cannot be distinguished from the image and would dominate the loss. Below it
            all times have the same weight. Min-SNR, in contrast, for v-prediction gives almost no
            weight to the first steps, in which colors and poses are decided.
        compiled: whether to compile the U-Net. Takes minutes once and makes it 1.4 times as fast on
            a CPU; requires a C++ compiler there.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoders: TextEncoders,
        images: TrainingImages,
        pairs: TrainingImages | None = None,
        evaluator: ImageEvaluator | None = None,
        batch: int = 64,
        face_weight: float = 3.0,
        gamma: float = 5.0,
        compiled: bool = False,
    ) -> None:
        self.unet = unet.to(memory_format=torch.channels_last)
        if next(unet.parameters()).device.type == "cpu":
            # On a CPU in float32, plain matrix products are 10% faster than fused attention.
            self.unet.set_attn_processor(AttnProcessor())
        self.network = torch.compile(self.unet, dynamic=False) if compiled else self.unet
        self.text_encoders = text_encoders
        self.images = images
        self.pairs = pairs
        self.evaluator = evaluator
        self.batch = batch
        self.gamma = gamma
        scheduler = build_scheduler()
        self.schedule = NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)
        self.loss = DiffusionLoss(self.schedule, face_weight=face_weight)

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the U-Net."""
        return {"unet": self.unet}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the diffusion loss of a random batch."""
        device = next(self.unet.parameters()).device
        images, batch = self.images, self.batch
        if self.pairs is not None and rng.step % PAIR_INTERVAL == PAIR_INTERVAL - 1:
            images, batch = self.pairs, self.batch // 2
        latents, captions = images.latents, images.captions
        rows = rng.indices(len(latents.images), batch)
        clean, face_masks = latents.rows(rows, device)
        variants = rng.randint(captions.tokens.shape[1], rows.shape, "variants")
        has_caption = rng.rand(rows.shape, "drop") >= CAPTION_DROPOUT
        tokens = captions.rows(rows, variants)
        height, width = clean.shape[-2:]
        size = (self.text_encoders.size, self.text_encoders.size * width // height)
        text = self.text_encoders(tokens.to(device), has_caption.to(device), size)
        noise = rng.randn(clean.shape, "noise").to(device)
        # Stratified: one number from each of B equal intervals. The loss varies less than with B
        # independent numbers.
        uniform = (torch.arange(len(rows)) + rng.rand(rows.shape, "time")) / len(rows)
        t = self.schedule.sample_timesteps(warp_uniform_times(uniform)).to(device)
        x_t = self.schedule.add_noise(clean, noise, t)
        step = DiffusionStep(
            predict(self.network, x_t, t, text), self.schedule.target(clean, noise, t), x_t, t
        )
        weight = (self.gamma / (self.schedule.snr(t) + 1)).clamp(max=1.0)
        return {"diffusion": (self.loss.per_sample(step, face_masks) * weight).mean()}

    def validate(self) -> Mapping[str, float]:
        """Evaluate the base on all prompts."""
        return self.evaluator.evaluate(self.unet) if self.evaluator else {}

    def sheet(self) -> Image.Image | None:
        """Draw images of the evaluation."""
        return self.evaluator.draw_sheet(self.unet) if self.evaluator else None
