"""Training of the miniature's text-to-image base: SDXL's architecture on cached latents, without any identity.

Faces are a third of a picture and the hardest part of it, so they weigh more in the loss. The examination makes images for
sentences of scenes that no training has seen and reads the attributes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn

from openpulid.bench import metrics
from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.mini.data.captions import Captions
from openpulid.mini.data.latents import Latents
from openpulid.mini.evaluation.evaluate import EvalPrompt, sample_prompts
from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.models.pipeline import (
    TextEncoders,
    build_pipeline,
    build_scheduler,
    predict,
    sample,
)
from openpulid.training.pulid.branches import DiffusionStep
from openpulid.training.pulid.losses import DiffusionLoss
from openpulid.training.rng import StepRNG

STEPS, GUIDANCE = 20, 3.0
"""Of the examination, and of the preset."""
UNIFORM = 0.25
"""Share of the times that are drawn evenly."""
DROPPED = 0.1
"""Share of pictures without their sentence, for guidance."""


@dataclass
class ImageEvaluator:
    """Makes images for sentences with held-out combinations and says how many of the wishes came true.

    Attributes:
        vae, words, tokenizer: what a U-Net needs to become a pipeline.
        reader: reads attributes; finder: sees faces, or None before there is one.
        asked: the wishes.
        steps, guidance: of the sampler; order: 2, or 1 for a student of single steps.
    """

    vae: Any
    words: TextEncoders
    tokenizer: Any
    reader: AttributeClassifier
    finder: MiniFaceDetector | None = None
    asked: tuple[EvalPrompt, ...] = ()
    steps: int = STEPS
    guidance: float = GUIDANCE
    order: int = 2

    @classmethod
    def with_wishes(cls, count: int, **parts: Any) -> ImageEvaluator:
        """`count` wishes, one for each held-out person (who is not in the sentence)."""
        return cls(**parts, asked=tuple(sample_prompts(count, 1)))

    def images(self, unet: Any, count: int | None = None) -> Tensor:
        """(B, 3, H, W) for the first `count` wishes."""
        pipe = build_pipeline(unet, self.vae, self.words, self.tokenizer)
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, solver_order=self.order
        )
        asked = self.asked[:count]
        prompts, seeds = [request.prompt for request in asked], [request.seed for request in asked]
        return sample(pipe, prompts, seeds, steps=self.steps, guidance=self.guidance)

    @torch.no_grad()
    def figures(self, unet: Any, count: int | None = None) -> dict[str, float]:
        """`attributes`: share of each sentence's wishes that can be seen; `face_found`."""
        device = next(self.reader.parameters()).device
        images = self.images(unet, count).to(device)
        wanted = [request.wanted for request in self.asked[:count]]
        found = {"attributes": metrics.attributes_seen(self.reader(images), wanted).mean().item()}
        if self.finder is not None:
            faces = self.finder.detect(images)
            found["face_found"] = sum(face is not None for face in faces) / len(faces)
        return found

    def sheet(self, unet: Any, count: int = 40) -> Image.Image:
        pictures = to_pil(self.images(unet, count))
        return image_grid(
            [pictures[start : start + 8] for start in range(0, len(pictures), 8)], 144
        )


def often_middle(uniform: Tensor) -> Tensor:
    """(B,) uniform numbers in [0, 1) -> as many in [0, 1), a quarter of them uniform, the others logit-normal about 0.31.

    With uniform times half of all training goes where only the coarsest colours show through the noise. Faces are decided
    below; Karras et al. (2022) and Esser et al. (2024) choose their times in the same way.
    """
    rest = ((uniform - UNIFORM) / (1 - UNIFORM)).clamp(1e-4, 1 - 1e-4)
    normal = -0.8 + torch.special.ndtri(rest.double())
    return torch.where(uniform < UNIFORM, uniform / UNIFORM, torch.sigmoid(normal).float()).clamp(
        max=1 - 1e-6
    )


class BaseTask:
    """Trains the U-Net; a `training.loop.Task`.

    Args:
        unet: from `pipeline.build_unet`.
        words: the text encoders.
        latents, captions: training pictures and their sentences.
        examination: None validates nothing.
        batch: pictures per step.
        inside: weight of the face over the rest.
        gamma: above this signal-to-noise ratio + 1 the loss is scaled down to it: what little noise is left there cannot be
            told from the picture, and would fill the loss. Below it all times count alike, unlike with min-SNR, which for
            the v-prediction forgets the first steps, where colours and poses are decided.
        compiled: minutes once for a U-Net that is 1.4 times as fast on a CPU; needs a C++ compiler there.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        words: TextEncoders,
        latents: Latents,
        captions: Captions,
        examination: ImageEvaluator | None = None,
        batch: int = 64,
        inside: float = 3.0,
        gamma: float = 5.0,
        compiled: bool = False,
    ) -> None:
        self.unet = unet.to(memory_format=torch.channels_last)
        if next(unet.parameters()).device.type == "cpu":
            # plain matrix products: a tenth faster on a CPU than fused attention in float32, the loop's own remedy
            self.unet.set_attn_processor(AttnProcessor())
        self.network = torch.compile(self.unet) if compiled else self.unet
        self.words, self.latents, self.captions, self.examination = (
            words,
            latents,
            captions,
            examination,
        )
        self.batch, self.gamma = batch, gamma
        known = build_scheduler()
        self.schedule = NoiseSchedule(known.alphas_cumprod, known.config.prediction_type)
        self.loss = DiffusionLoss(self.schedule, inside=inside)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet}

    def losses(self, draw: StepRNG) -> Mapping[str, Tensor]:
        device = next(self.unet.parameters()).device
        rows = draw.indices(len(self.latents.images), self.batch)
        clean, faces = self.latents.rows(rows, device)
        variants = draw.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        kept = draw.rand(rows.shape, "drop") >= DROPPED
        text = self.words(self.captions.rows(rows, variants).to(device), kept.to(device))
        noise = draw.randn(clean.shape, "noise").to(device)
        # one number out of each of B equal spans: the loss is calmer than with B free ones
        spread = (torch.arange(len(rows)) + draw.rand(rows.shape, "time")) / len(rows)
        t = self.schedule.sample_timesteps(often_middle(spread)).to(device)
        x_t = self.schedule.add_noise(clean, noise, t)
        step = DiffusionStep(
            predict(self.network, x_t, t, text), self.schedule.target(clean, noise, t), x_t, t
        )
        weight = (self.gamma / (self.schedule.snr(t) + 1)).clamp(max=1.0)
        return {"diffusion": (self.loss.per_sample(step, faces) * weight).mean()}

    def validate(self) -> Mapping[str, float]:
        return self.examination.figures(self.unet, 64) if self.examination else {}

    def sheet(self) -> Image.Image | None:
        return self.examination.sheet(self.unet) if self.examination else None
