"""Training of the 4-step student: one round of progressive distillation.

Salimans & Ho (arXiv 2202.00512). The teacher is the base model with guidance. It denoises in small
steps, and its latents at the student's four timesteps are stored. The student learns to get from
one of these timesteps to the next in a single step, without guidance. Stored trajectories cost the
teacher's steps once, and the student uses each of them several times. The student must be sampled
as it was trained: four first-order steps with trailing spacing and guidance 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.diffusion.flow_schedule import FlowSchedule
from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.io.checkpoints import module_fingerprint
from openpulid.mini.data import ArrayCache, Captions
from openpulid.mini.evaluation.image_evaluator import GUIDANCE, STEPS, ImageEvaluator
from openpulid.mini.models import build_scheduler
from openpulid.mini.train.networks import BaseNetwork
from openpulid.training import StepRNG, generator_for

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
        teacher: BaseNetwork,
        captions: Captions,
        count: int,
        folder: Path,
        batch: int = 64,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> TeacherTrajectories:
        """Compute trajectories, or load those that are cached; the files are memory-mapped.

        Args:
            teacher: the base model, frozen.
            captions: captions to choose from.
            count: number of trajectories.
            folder: folder of the cache.
            batch: trajectories per batch.
            seed: determines captions and noise.
            on_progress: called with the number of trajectories done and their total.
        """
        networks = teacher.modules().items()
        fingerprints = {name: module_fingerprint(module) for name, module in networks}
        tokens = hashlib.sha256(captions.tokens.tobytes()).hexdigest()
        cache = ArrayCache(folder, {**fingerprints, "captions": tokens, "seed": seed}, count)

        def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
            # The name of the generator is part of the seed, like those of StepRNG below.
            generator = generator_for(seed, "walks", int(rows[0]))
            return _compute_batch(teacher, captions, len(rows), generator)

        cache.fill(compute, batch, on_progress)
        return cls(cache.load("latents", mmap=True), cache.load("tokens", mmap=True))


def _compute_batch(
    teacher: BaseNetwork, captions: Captions, size: int, generator: torch.Generator
) -> dict[str, np.ndarray]:
    """Compute a batch of trajectories with random captions and noise."""
    device = _device(teacher)
    rows = torch.randint(len(captions.tokens), (size,), generator=generator)
    variants = torch.randint(captions.tokens.shape[1], rows.shape, generator=generator)
    tokens = captions.rows(rows, variants)
    noise = torch.randn(size, *teacher.latent_shape, generator=generator)
    latents = compute_trajectories(teacher, noise.to(device), tokens.to(device))
    return {
        "latents": latents.to("cpu", torch.float16).numpy(),
        "tokens": tokens.numpy().astype(np.uint8),
    }


@torch.no_grad()
def compute_trajectories(
    teacher: BaseNetwork,
    noise: Tensor,
    tokens: Tensor,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Denoise with classifier-free guidance as the preset does, and keep the latents on the way.

    Args:
        teacher: the base model.
        noise: (B, C, s, s) initial noise.
        tokens: (B, L) of the captions.
        steps: sampling steps, a multiple of `STUDENT_TIMESTEPS`.
        guidance: guidance scale.

    Returns:
        (B, 5, C, s, s): the noise, and the latents after each quarter of the steps.
    """
    sampler = teacher.start_sampler(steps, noise.device)
    keep = torch.arange(2, device=tokens.device).repeat_interleave(len(tokens)) == 1
    both_texts = teacher.encode_text(torch.cat([tokens, tokens]), keep)
    x = noise
    trajectory = [noise]
    for index, t in enumerate(sampler.timesteps, 1):
        times = teacher.to_timesteps(t).expand(2 * len(x))
        without_text, with_text = teacher.predict(torch.cat([x, x]), times, both_texts).chunk(2)
        guided = without_text + guidance * (with_text - without_text)
        x = sampler.step(guided, t, x, return_dict=False)[0]
        if index % (steps // STUDENT_TIMESTEPS) == 0:
            trajectory.append(x)
    return torch.stack(trajectory, 1)


def _device(network: BaseNetwork) -> torch.device:
    return next(next(iter(network.modules().values())).parameters()).device


class StudentSchedule:
    """The student's timesteps, and the prediction that leads from one to the next.

    Args:
        times: (4,) timesteps, decreasing.
        signal: (5,) factors of the image at these times and at the end.
        noise: (5,) factors of the noise.
        is_flow: whether the network predicts the velocity of a flow instead of v.
    """

    def __init__(self, times: Tensor, signal: Tensor, noise: Tensor, is_flow: bool = False) -> None:
        self.times = times
        self.signal = signal
        self.noise = noise
        self.is_flow = is_flow

    @classmethod
    def for_unet(cls) -> StudentSchedule:
        """Create the schedule of SDXL's U-Net."""
        sampler = build_scheduler()
        sampler.set_timesteps(STUDENT_TIMESTEPS)
        times = sampler.timesteps.long()
        alphas = NoiseSchedule(sampler.alphas_cumprod, sampler.config.prediction_type).alphas
        student_alphas = torch.cat([alphas[times], torch.ones(1, dtype=alphas.dtype)])
        return cls(times, student_alphas.sqrt().float(), (1 - student_alphas).sqrt().float())

    @classmethod
    def for_flow(cls, schedule: FlowSchedule) -> StudentSchedule:
        """Create the schedule of a flow model."""
        levels = schedule.trailing_sigmas(STUDENT_TIMESTEPS)
        return cls(levels[:-1], 1 - levels, levels, is_flow=True)

    @classmethod
    def for_network(cls, network: BaseNetwork) -> StudentSchedule:
        """Create the schedule of a network."""
        if isinstance(network.schedule, FlowSchedule):
            return cls.for_flow(network.schedule)
        return cls.for_unet()

    def target(self, x: Tensor, x_next: Tensor, index: Tensor) -> Tensor:
        """Compute the prediction of a deterministic step from one timestep to the next.

        With x_0 = a x - s v and eps = s x + a v the step ends at a' x_0 + s' eps, solved for v.
        For a flow it is x_0 = x - s v and eps = x + a v.

        Args:
            x: (B, C, s, s) latents at timestep `index`.
            x_next: (B, C, s, s) the teacher's latents at the next timestep.
            index: (B,) indices of timesteps.

        Returns:
            (B, C, s, s).
        """
        a, s, a_next, s_next = self._coefficients(index, x)
        unchanged = a_next + s_next if self.is_flow else a_next * a + s_next * s
        return (x_next - unchanged * x) / (s_next * a - a_next * s)

    def weight(self, index: Tensor, like: Tensor) -> Tensor:
        """Compute the truncated SNR weighting (Salimans & Ho, section 4) of an error of `target`.

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
        student: a copy of the base model.
        trajectories: of the teacher.
        evaluator: of a pipeline with the student, with 4 steps of order 1 and guidance 1; None
            disables validation.
        batch: samples per step.
    """

    def __init__(
        self,
        student: BaseNetwork,
        trajectories: TeacherTrajectories,
        evaluator: ImageEvaluator | None = None,
        batch: int = 48,
    ) -> None:
        self.student = student
        self.trajectories = trajectories
        self.evaluator = evaluator
        self.batch = batch
        self.schedule = StudentSchedule.for_network(student)

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the modules of the student that train."""
        return self.student.modules()

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the distillation loss of random trajectories and timesteps."""
        device = _device(self.student)
        rows = rng.indices(len(self.trajectories.tokens), self.batch)
        index = rng.randint(STUDENT_TIMESTEPS, rows.shape, "station")
        latents = torch.from_numpy(self.trajectories.latents[rows.numpy()]).float()
        samples = torch.arange(len(rows))
        x = latents[samples, index].to(device)
        x_next = latents[samples, index + 1].to(device)
        tokens = self.trajectories.tokens[rows.numpy()].astype(np.int64)
        text = self.student.encode_text(torch.from_numpy(tokens).to(device))
        prediction = self.student.predict(x, self.schedule.times[index].to(device), text)
        target = self.schedule.target(x, x_next, index)
        error = (prediction - target).square().flatten(1).mean(1)
        return {"step": (error * self.schedule.weight(index, error)).mean()}

    def validate(self) -> Mapping[str, float]:
        """Evaluate the student on all prompts."""
        return self.evaluator.evaluate() if self.evaluator else {}

    def sheet(self) -> Image.Image | None:
        """Draw images of the evaluation."""
        return self.evaluator.draw_sheet() if self.evaluator else None
