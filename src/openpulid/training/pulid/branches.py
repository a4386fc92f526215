"""Paths through a base model that a loss can be computed on.

- `diffusion_branch`: one prediction from a noised training image (PuLID, arXiv 2404.16022, section
  3.1).
- `lightning_branch`: an image generated from pure noise in a few steps, with gradients through the
  last steps (section 3.2).
- `queries_at_step`: cross-attention queries at a single step, for the variant without acceleration.

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
    """One step of the diffusion branch.

    Attributes:
        output: (B, c, h, w) prediction of the base.
        target: (B, c, h, w) what it should predict.
        x_t: (B, c, h, w) noised latents.
        t: (B,) timesteps.
    """

    output: Tensor
    target: Tensor
    x_t: Tensor
    t: Tensor


def diffusion_branch(
    base: BaseModel, rng: StepRNG, latents: Tensor, text: Any, timestep_bias: float | None = 0.0
) -> DiffusionStep:
    """Predict from noised training images, the basis of L_diff (PuLID, section 3.1).

    Args:
        base: the base model.
        rng: draws noise and timesteps.
        latents: (B, c, h, w) of the images, on the base's device.
        text: result of `base.encode_text` for their captions.
        timestep_bias: timesteps are drawn with density t ** bias; 0 is uniform, as in the paper.
            A flow model draws from its own distribution instead. None is uniform for every model,
            for validation.
    """
    noise = rng.randn(latents.shape, "noise").to(latents)
    uniform = rng.rand(latents.shape[:1], "time")
    if timestep_bias is None:
        t = base.schedule.spread_timesteps(uniform)
    else:
        t = base.schedule.sample_timesteps(uniform, timestep_bias)
    t = t.to(latents.device)
    x_t = base.schedule.add_noise(latents, noise, t)
    target = base.schedule.target(latents, noise, t)
    return DiffusionStep(base.predict(x_t, t, text), target, x_t, t)


@dataclass(frozen=True)
class RolloutConfig:
    """Settings of a few-step rollout from noise to an image.

    Attributes:
        steps: number of steps, in trailing spacing; lightning models are distilled for 4.
        grad_steps: number of final steps that carry gradients.
        guidance_scale: 1 is without guidance, as for lightning models; otherwise the text must be
            encoded with `guided=True`.
        sampler: one of `diffusion.sampling`, with its other arguments bound.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
    """

    steps: int = 4
    grad_steps: int = 1
    guidance_scale: float = 1.0
    sampler: Sampler = euler
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.grad_steps <= self.steps:
            raise OptionError(
                f"grad_steps is {self.grad_steps}, but the rollout has {self.steps} steps: "
                f"choose 0 to {self.steps}."
            )

    @property
    def is_guided(self) -> bool:
        """Whether predictions use classifier-free guidance."""
        return self.guidance_scale != 1


@dataclass(frozen=True)
class Rollout:
    """Result of a rollout.

    Attributes:
        latents: (B, c, h, w) of the image.
        attention: for each captured step, queries and keys of every cross-attention layer.
    """

    latents: Tensor
    attention: Sequence[Sequence[AttentionQK]] = ()

    @property
    def layers(self) -> list[AttentionQK]:
        """The attention of all captured steps in one list."""
        return [layer for step in self.attention for layer in step]


def lightning_branch(
    base: BaseModel,
    noise: Tensor,
    text: Any,
    config: RolloutConfig,
    *,
    capture_attention: bool = False,
) -> Rollout:
    """Generate images from pure noise, differentiable through the last steps (PuLID, section 3.2).

    Args:
        base: a few-step model, or any base.
        noise: (B, c, h, w), standard normal.
        text: result of `base.encode_text` for B prompts, guided if the rollout is.
        config: of the rollout.
        capture_attention: return queries and keys of the last `grad_steps` steps, also under
            `no_grad`.

    Raises:
        OptionError: attention of a guided rollout was requested.
    """
    if capture_attention and config.is_guided:
        raise OptionError(
            "attention of a guided rollout cannot be captured: use queries_at_step instead."
        )
    sigmas = base.schedule.trailing_sigmas(config.steps)
    if config.grad_steps:
        first_grad_sigma = sigmas[config.steps - config.grad_steps]
    else:
        first_grad_sigma = torch.zeros(())
    attention: list[Sequence[AttentionQK]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        has_grad = bool(sigma[0] <= first_grad_sigma)
        with torch.set_grad_enabled(torch.is_grad_enabled() and has_grad):
            layers: list[AttentionQK] = []

            def predict(x_t: Tensor, t: Tensor) -> Tensor:
                output, captured = _predict(
                    base, x_t, t, text, config, capture_attention and has_grad
                )
                layers.extend(captured)
                return output

            denoised = base.schedule.denoise(predict, x, sigma)
        if capture_attention and has_grad:
            attention.append(layers)
        return denoised

    return Rollout(
        config.sampler(denoise, base.schedule.initial_sample(noise, sigmas), sigmas), attention
    )


def queries_at_step(base: BaseModel, x: Tensor, sigma: Tensor, text: Any) -> Rollout:
    """Capture queries and keys of every cross-attention layer in one unguided prediction.

    Args:
        base: the model.
        x: (B, c, h, w) sample, as the samplers scale it.
        sigma: (B,) its noise level.
        text: result of `base.encode_text` for B prompts.

    Returns:
        The estimate of x_0, and the attention of this step.
    """
    with base.capture_attention() as attention:
        denoised = base.schedule.denoise(lambda x_t, t: base.predict(x_t, t, text), x, sigma)
    return Rollout(denoised, [attention])


@torch.no_grad()
def denoise_until(
    base: BaseModel, noise: Tensor, text: Any, config: RolloutConfig, step: int
) -> tuple[Tensor, Tensor]:
    """Run a rollout up to `step` (from 0), without gradients.

    Returns:
        The sample (B, c, h, w) before that step, and its noise level (B,).
    """
    sigmas = base.schedule.trailing_sigmas(config.steps)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        output, _ = _predict(base, x_t, t, text, config, False)
        return output

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return base.schedule.denoise(predict, x, sigma)

    x = base.schedule.initial_sample(noise, sigmas)
    if step:
        x = config.sampler(denoise, x, sigmas[: step + 1])
    return x, sigmas[step].to(noise).expand(len(noise))


def _predict(
    base: BaseModel,
    x_t: Tensor,
    t: Tensor,
    text: Any,
    config: RolloutConfig,
    capture_attention: bool,
) -> tuple[Tensor, list[AttentionQK]]:
    """Run one prediction of a rollout; return it and the captured attention."""

    def call(x_t: Tensor, t: Tensor) -> tuple[Tensor, list[AttentionQK]]:
        if config.is_guided:
            both = base.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), text)
            unconditional, conditional = both.chunk(2)
            return torch.lerp(unconditional, conditional, config.guidance_scale), []
        if not capture_attention:
            return base.predict(x_t, t, text), []
        with base.capture_attention() as attention:
            return base.predict(x_t, t, text), attention

    if config.gradient_checkpointing and torch.is_grad_enabled():
        result: tuple[Tensor, list[AttentionQK]] = checkpoint(call, x_t, t, use_reentrant=False)
        return result
    return call(x_t, t)
