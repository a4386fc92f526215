"""Training of the 4-step student: one round of progressive distillation.

Salimans & Ho (arXiv 2202.00512). The teacher is the base model with guidance. It denoises in small
steps, and its latents at the student's four timesteps are stored. The student learns to get from
one of these timesteps to the next in a single step, without guidance. Stored trajectories cost the
teacher's steps once, and the student uses each of them several times. The student must be sampled
as it was trained: four first-order steps with trailing spacing and guidance 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.io.checkpoints import module_fingerprint
from openpulid.mini.data import ArrayCache, Captions
from openpulid.mini.evaluation.image_evaluator import GUIDANCE, STEPS, ImageEvaluator
from openpulid.mini.models import TextEncoders, build_scheduler, predict
from openpulid.training import StepRNG, generator_for
from openpulid.training.pulid import TextConditioning

STUDENT_TIMESTEPS = 4
"""Steps of the student."""


class TeacherTrajectories:
    """Latents that the teacher passes from noise to image, and the captions of the images.

    Attributes:
        latents: (N, 5, C, s, s) float16 noise, and the latents after each quarter of the steps.
        tokens: (N, L) uint8 tokens of the captions.
    """

    def __init__(self, latents: np.ndarray, tokens: np.ndarray) -> None:
        self.latents = latents
        self.tokens = tokens

    @classmethod
    def build(
        cls,
        unet: Any,
        text_encoders: TextEncoders,
        captions: Captions,
        count: int,
        folder: Path,
        batch: int = 64,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> TeacherTrajectories:
        """Compute trajectories, or load those that are cached; the files are memory-mapped.

        Args:
            unet: the teacher.
            text_encoders: the frozen text encoders.
            captions: captions to choose from.
            count: number of trajectories.
            folder: folder of the cache.
            batch: trajectories per batch.
            seed: determines captions and noise.
            on_progress: called with the number of trajectories done and their total.
        """
        cache = ArrayCache(folder, {"unet": module_fingerprint(unet), "seed": seed}, count)
        for start in range(cache.num_done, count, batch):
            size = min(batch, count - start)
            # The name of the generator is part of the seed, like those of StepRNG below.
            generator = generator_for(seed, "walks", start)
            cache.write(_compute_batch(unet, text_encoders, captions, size, generator))
            if on_progress:
                on_progress(cache.num_done, count)
        return cls(cache.load("latents", mmap=True), cache.load("tokens", mmap=True))


def _compute_batch(
    unet: Any,
    text_encoders: TextEncoders,
    captions: Captions,
    size: int,
    generator: torch.Generator,
) -> dict[str, np.ndarray]:
    """Compute a batch of trajectories with random captions and noise."""
    device = next(unet.parameters()).device
    rows = torch.randint(len(captions.tokens), (size,), generator=generator)
    variants = torch.randint(captions.tokens.shape[1], rows.shape, generator=generator)
    tokens = captions.rows(rows, variants)
    channels = unet.config.in_channels
    side = unet.config.sample_size
    noise = torch.randn(size, channels, side, side, generator=generator)
    text = text_encoders(tokens.to(device))
    empty_text = text_encoders(tokens.to(device), torch.zeros(size, dtype=torch.bool))
    latents = compute_trajectories(unet, noise.to(device), text, empty_text)
    return {
        "latents": latents.to("cpu", torch.float16).numpy(),
        "tokens": tokens.numpy().astype(np.uint8),
    }


@torch.no_grad()
def compute_trajectories(
    unet: nn.Module,
    noise: Tensor,
    text: TextConditioning,
    empty_text: TextConditioning,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Denoise with classifier-free guidance as the preset does, and keep the latents on the way.

    Args:
        unet: the teacher.
        noise: (B, C, s, s) initial noise.
        text: the conditioning.
        empty_text: the conditioning without caption.
        steps: sampling steps, a multiple of `STUDENT_TIMESTEPS`.
        guidance: guidance scale.

    Returns:
        (B, 5, C, s, s): the noise, and the latents after each quarter of the steps.
    """
    sampler = build_scheduler()
    sampler.set_timesteps(steps, device=noise.device)
    pairs = zip(vars(empty_text).values(), vars(text).values(), strict=True)
    both_texts = TextConditioning(*(torch.cat(pair) for pair in pairs))
    x = noise
    trajectory = [noise]
    for index, t in enumerate(sampler.timesteps, 1):
        prediction = predict(unet, torch.cat([x, x]), t.expand(2 * len(x)), both_texts)
        without_text, with_text = prediction.chunk(2)
        guided = without_text + guidance * (with_text - without_text)
        x = sampler.step(guided, t, x, return_dict=False)[0]
        if index % (steps // STUDENT_TIMESTEPS) == 0:
            trajectory.append(x)
    return torch.stack(trajectory, 1)


class StudentSchedule:
    """The student's timesteps, and the prediction that leads from one to the next.

    Attributes:
        times: (4,) timesteps, decreasing.
        signal: (5,) factors of the image at these times and at the end.
        noise: (5,) factors of the noise.
    """

    def __init__(self) -> None:
        sampler = build_scheduler()
        sampler.set_timesteps(STUDENT_TIMESTEPS)
        self.times = sampler.timesteps.long()
        alphas = NoiseSchedule(sampler.alphas_cumprod, sampler.config.prediction_type).alphas
        student_alphas = torch.cat([alphas[self.times], torch.ones(1, dtype=alphas.dtype)])
        self.signal = student_alphas.sqrt().float()
        self.noise = (1 - student_alphas).sqrt().float()

    def target(self, x: Tensor, x_next: Tensor, index: Tensor) -> Tensor:
        """Compute the v-prediction of a deterministic step from one timestep to the next.

        With x_0 = a x - s v and eps = s x + a v the step ends at a' x_0 + s' eps, solved for v.

        Args:
            x: (B, C, s, s) latents at timestep `index`.
            x_next: (B, C, s, s) the teacher's latents at the next timestep.
            index: (B,) indices of timesteps.

        Returns:
            (B, C, s, s).
        """
        a, s, a_next, s_next = self._coefficients(index, x)
        return (x_next - (a_next * a + s_next * s) * x) / (s_next * a - a_next * s)

    def weight(self, index: Tensor, like: Tensor) -> Tensor:
        """Compute the truncated SNR weighting (Salimans & Ho, section 4) of an error of v.

        An error of x_0 has the weight max(SNR, 1).

        Args:
            index: (B,) indices of timesteps.
            like: a tensor of the device and dtype.

        Returns:
            (B,) weights.
        """
        a, s, _, _ = self._coefficients(index, like)
        return torch.maximum(a**2, s**2).flatten()

    def _coefficients(self, index: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """Return signal and noise at a timestep and at the next one, each (B, 1, 1, 1)."""
        table = [
            self.signal[index],
            self.noise[index],
            self.signal[index + 1],
            self.noise[index + 1],
        ]
        return tuple(value.to(like).view(-1, 1, 1, 1) for value in table)


class LightningTask:
    """Trains the student; a `training.trainer.Task`.

    Args:
        student: a copy of the base model's U-Net.
        text_encoders: the frozen text encoders.
        trajectories: of the teacher.
        evaluator: with 4 steps of order 1 and guidance 1; None disables validation.
        batch: samples per step.
        compiled: see `BaseTask`.
    """

    def __init__(
        self,
        student: nn.Module,
        text_encoders: TextEncoders,
        trajectories: TeacherTrajectories,
        evaluator: ImageEvaluator | None = None,
        batch: int = 48,
        compiled: bool = False,
    ) -> None:
        self.student = student.to(memory_format=torch.channels_last)
        self.network = torch.compile(student) if compiled else student
        self.text_encoders = text_encoders
        self.trajectories = trajectories
        self.evaluator = evaluator
        self.batch = batch
        self.schedule = StudentSchedule()

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the student."""
        return {"unet": self.student}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the distillation loss of random trajectories and timesteps."""
        device = next(self.student.parameters()).device
        rows = rng.indices(len(self.trajectories.tokens), self.batch)
        index = rng.randint(STUDENT_TIMESTEPS, rows.shape, "station")
        latents = torch.from_numpy(self.trajectories.latents[rows.numpy()]).float()
        samples = torch.arange(len(rows))
        x = latents[samples, index].to(device)
        x_next = latents[samples, index + 1].to(device)
        tokens = self.trajectories.tokens[rows.numpy()].astype(np.int64)
        text = self.text_encoders(torch.from_numpy(tokens).to(device))
        prediction = predict(self.network, x, self.schedule.times[index].to(device), text)
        target = self.schedule.target(x, x_next, index)
        error = (prediction - target).square().flatten(1).mean(1)
        return {"step": (error * self.schedule.weight(index, error)).mean()}

    def validate(self) -> Mapping[str, float]:
        """Evaluate the student on all prompts."""
        return self.evaluator.evaluate(self.student) if self.evaluator else {}

    def sheet(self) -> Image.Image | None:
        """Draw images of the evaluation."""
        return self.evaluator.draw_sheet(self.student) if self.evaluator else None
