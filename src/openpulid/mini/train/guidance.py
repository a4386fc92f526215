"""Guidance distillation: a copy of FLUX's base learns to predict what guidance would.

Meng et al. (arXiv 2210.03142), first stage; FLUX.1-dev is distilled in this way. Classifier-free
guidance g extrapolates from the prediction v_u with the empty prompt over v_c with the prompt:

    v_g = v_u + g (v_c - v_u)

The copy has an embedding of g and predicts v_g at once.
Shapes: B batch, c x h x w latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn

from openpulid.mini.train.base_task import TrainingImages
from openpulid.mini.train.networks import FluxNetwork
from openpulid.training import StepRNG
from openpulid.training.pulid import FluxText

GUIDANCE_RANGE = (1.0, 5.0)
"""Guidance is drawn uniformly from this range."""
VALIDATED_GUIDANCE = (1.0, 2.5, 4.0)
HELD_OUT_BATCHES = 4
HELD_OUT_SEED = 0


def add_guidance_embedding(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Return a copy of a transformer with a guidance embedding, which can train.

    The last layer of the embedding is zero, so that the copy predicts the same for any guidance.
    """
    copy = FluxTransformer2DModel.from_config(transformer.config, guidance_embeds=True)
    embedder = copy.time_text_embed.guidance_embedder
    nn.init.zeros_(embedder.linear_2.weight)
    nn.init.zeros_(embedder.linear_2.bias)
    prefix = "time_text_embed.guidance_embedder"
    state = {f"{prefix}.{name}": value for name, value in embedder.state_dict().items()}
    copy.load_state_dict(transformer.state_dict() | state)
    return copy.to(transformer.device)


@dataclass(frozen=True)
class TeacherPredictions:
    """Predictions of the teacher, and their inputs.

    Attributes:
        x_t: (B, c, h, w) noised latents.
        t: (B,) noise levels.
        text: of the captions.
        with_text: (B, c, h, w) velocity with the captions.
        without_text: (B, c, h, w) velocity with the empty prompt.
    """

    x_t: Tensor
    t: Tensor
    text: FluxText
    with_text: Tensor
    without_text: Tensor

    def guided(self, guidance: Tensor) -> Tensor:
        """Return the velocity (B, c, h, w) with classifier-free guidance (B,)."""
        return torch.lerp(self.without_text, self.with_text, guidance[:, None, None, None])


class GuidanceTask:
    """Trains a base with a guidance embedding; a `training.trainer.Task`.

    Args:
        student: the network with a guidance embedding. Its text encoders do not train.
        teacher: the base, frozen.
        images: the training images.
        held_out: images of the validation; None disables it.
        batch: images per step.
    """

    def __init__(
        self,
        student: FluxNetwork,
        teacher: FluxNetwork,
        images: TrainingImages,
        held_out: TrainingImages | None = None,
        batch: int = 32,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.images = images
        self.held_out = held_out
        self.batch = batch

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the student's transformer."""
        return self.student.modules()

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the mean squared error against the guided teacher for random guidance."""
        teacher = self.predict_with_teacher(self.images, rng)
        low, high = GUIDANCE_RANGE
        guidance = low + (high - low) * rng.rand(teacher.t.shape, "guidance").to(teacher.t)
        prediction = self.student.predict(teacher.x_t, teacher.t, teacher.text, guidance)
        return {"guidance": (prediction - teacher.guided(guidance)).square().mean()}

    @torch.no_grad()
    def predict_with_teacher(self, images: TrainingImages, rng: StepRNG) -> TeacherPredictions:
        """Predict from random images at noise levels of the base's training, without gradient.

        Args:
            images: the images.
            rng: draws images, captions, noise and noise levels.
        """
        teacher = self.teacher
        device = teacher.transformer.device
        latents, captions = images.latents, images.captions
        rows = rng.indices(len(latents.images), self.batch)
        clean, _ = latents.rows(rows, device)
        variants = rng.randint(captions.tokens.shape[1], rows.shape, "variants")
        tokens = captions.rows(rows, variants).to(device)
        noise = rng.randn(clean.shape, "noise").to(device)
        # stratified, as in the base's training
        uniform = (torch.arange(len(rows)) + rng.rand(rows.shape, "time")) / len(rows)
        t = teacher.sample_timesteps(uniform).to(device)
        x_t = teacher.schedule.add_noise(clean, noise, t)
        text = teacher.encode_text(tokens)
        has_text = torch.zeros(len(tokens), dtype=torch.bool, device=device)
        return TeacherPredictions(
            x_t,
            t,
            text,
            with_text=teacher.predict(x_t, t, text),
            without_text=teacher.predict(x_t, t, teacher.encode_text(tokens, has_text)),
        )

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Measure the error on held-out images, relative to that of the base without guidance.

        Returns:
            `error_at_G`: the mean squared error against the teacher with guidance G, divided by
            that of the base's own prediction. An untrained copy has 1, a perfect one 0. With
            guidance 1 the base has no error; there the divisor is the base's error at guidance 2,
            and an untrained copy has 0.
        """
        if self.held_out is None:
            return {}
        errors = dict.fromkeys(VALIDATED_GUIDANCE, 0.0)
        base_error = 0.0  # at guidance 2; it grows with (guidance - 1)^2
        for step in range(HELD_OUT_BATCHES):
            teacher = self.predict_with_teacher(self.held_out, StepRNG(HELD_OUT_SEED, step))
            base_error += (teacher.with_text - teacher.without_text).square().mean().item()
            for value in VALIDATED_GUIDANCE:
                guidance = torch.full_like(teacher.t, value)
                prediction = self.student.predict(teacher.x_t, teacher.t, teacher.text, guidance)
                errors[value] += (prediction - teacher.guided(guidance)).square().mean().item()
        return {
            f"error_at_{value:g}": error / (base_error * ((value - 1) ** 2 or 1.0))
            for value, error in errors.items()
        }

    def sheet(self) -> Image.Image | None:
        """Return None: images would not show the error."""
        return None
