"""The paths through a base model that a loss can be put on.

- `diffusion_branch`: a real picture, noise over it, one prediction (PuLID, arXiv 2404.16022, section 3.1).
- `lightning_branch`: a picture made from pure noise in a few steps, with gradients through the last ones (section 3.2).
- `asked_at_step`: what the cross-attention asks at a single step of such a path, for the form without acceleration.

Shapes: B batch, c x h x w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openpulid.diffusion.sampling import Sampler, euler
from openpulid.errors import OptionError
from openpulid.training.pulid.models import AttentionQK, BaseModel
from openpulid.training.rng import StepRNG


@dataclass(frozen=True)
class DiffusionStep:
    """One step of the diffusion branch: what was predicted, what was wanted, from where. All (B, c, h, w), t
    (B,)."""

    output: Tensor
    target: Tensor
    x_t: Tensor
    t: Tensor


def diffusion_branch(
    base: BaseModel, draw: StepRNG, latents: Tensor, text: Any, late: float = 0.0
) -> DiffusionStep:
    """Noise of a drawn strength over real pictures, and the base's prediction: the ground of L_diff (PuLID,
    section 3.1).

    Args:
        latents: (B, c, h, w), the pictures, on the base's device.
        text: what `base.encode_text` gave for their prompts.
        late: how much more often times of much noise are drawn (`NoiseSchedule.times`); 0 is the paper's even drawing.
    """
    noise = draw.randn(latents.shape, "noise").to(latents)
    t = base.schedule.sample_timesteps(draw.rand(latents.shape[:1], "time"), late).to(latents.device)
    x_t = base.schedule.add_noise(latents, noise, t)
    return DiffusionStep(
        base.predict(x_t, t, text), base.schedule.target(latents, noise, t), x_t, t
    )


@dataclass(frozen=True)
class RolloutConfig:
    """How a branch comes from noise to a picture.

    Attributes:
        steps: in trailing spacing; 4 is what a lightning model was distilled for.
        last: how many of them, at the end, carry gradient.
        guidance: 1 is without (a lightning model needs none); otherwise the text must be encoded `guided`.
        sampler: one of `sampling`, given its other arguments.
        checkpoint: forget a step's activations and compute them again in the backward pass: less memory, more time.
    """

    steps: int = 4
    last: int = 1
    guidance: float = 1.0
    sampler: Sampler = euler
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.last <= self.steps:
            raise OptionError(
                f"gradients through the last {self.last} of {self.steps} steps: choose 0 to {self.steps}"
            )


@dataclass(frozen=True)
class Rollout:
    """What a walk gave: the picture's latents (B, c, h, w), and per watched step what each layer attended to."""

    latents: Tensor
    attended: Sequence[Sequence[AttentionQK]] = ()


def lightning_branch(
    base: BaseModel, noise: Tensor, text: Any, walk: RolloutConfig, *, watch: bool = False
) -> Rollout:
    """From pure noise to a picture (PuLID, section 3.2), differentiable through the last steps.

    Args:
        noise: (B, c, h, w), standard normal.
        text: `base.encode_text` of B prompts, guided if the walk is.
        watch: keep the queries and keys of the steps that carry gradient (`walk.last`), also under `no_grad`.
    """
    if watch and walk.guidance != 1:
        raise OptionError(
            "queries are watched without guidance only: use asked_at_step for a guided base"
        )
    sigmas = base.schedule.trailing_sigmas(walk.steps)
    turn = sigmas[walk.steps - walk.last] if walk.last else torch.zeros(())
    attended: list[Sequence[AttentionQK]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        late = bool(sigma[0] <= turn)
        with torch.set_grad_enabled(torch.is_grad_enabled() and late):
            seen: list[AttentionQK] = []

            def predict(x_t: Tensor, t: Tensor) -> Tensor:
                output, asked = _called(base, x_t, t, text, walk, watch and late)
                seen.extend(asked)
                return output

            picture = base.schedule.denoise(predict, x, sigma)
        if watch and late:
            attended.append(seen)
        return picture

    start = noise * (1 + sigmas[0].square()).sqrt().to(
        noise
    )  # so that x_t of the first step is the noise itself
    return Rollout(walk.sampler(denoise, start, sigmas), attended)


def queries_at_step(base: BaseModel, x: Tensor, sigma: Tensor, text: Any) -> list[AttentionQK]:
    """What every cross-attention layer asks in one prediction at x (B, c, h, w), of noise level sigma (B,); no guidance."""
    with base.watch() as seen:
        base.schedule.denoise(lambda x_t, t: base.predict(x_t, t, text), x, sigma)
    return seen


@torch.no_grad()
def denoise_until(
    base: BaseModel, noise: Tensor, text: Any, walk: RolloutConfig, step: int
) -> tuple[Tensor, Tensor]:
    """x (B, c, h, w) and sigma (B,) before `step` (from 0) of a walk, without gradient."""
    sigmas = base.schedule.trailing_sigmas(walk.steps)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return base.schedule.denoise(
            lambda x_t, t: _called(base, x_t, t, text, walk, False)[0], x, sigma
        )

    start = noise * (1 + sigmas[0].square()).sqrt().to(noise)
    x = walk.sampler(denoise, start, sigmas[: step + 1]) if step else start
    return x, sigmas[step].to(noise).expand(len(noise))


def _called(
    base: BaseModel, x_t: Tensor, t: Tensor, text: Any, walk: RolloutConfig, watch: bool
) -> tuple[Tensor, list[AttentionQK]]:
    """One prediction, guided if the walk is, and what was attended to meanwhile."""

    def call(x_t: Tensor, t: Tensor) -> tuple[Tensor, list[AttentionQK]]:
        if walk.guidance != 1:
            nothing, wanted = base.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), text).chunk(2)
            return torch.lerp(nothing, wanted, walk.guidance), []
        if not watch:
            return base.predict(x_t, t, text), []
        with base.watch() as seen:
            return base.predict(x_t, t, text), seen

    if walk.checkpoint and torch.is_grad_enabled():
        made: tuple[Tensor, list[AttentionQK]] = checkpoint(call, x_t, t, use_reentrant=False)
        return made
    return call(x_t, t)
