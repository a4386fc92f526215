"""Sampling from a U-Net on the device, and the teacher's rollouts that the student learns from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openpulid.device import synchronize
from openpulid.mini.accelerated.steps import autocast
from openpulid.mini.accelerated.train_set import TrainSet, add_unconditional
from openpulid.mini.evaluation.image_evaluator import GUIDANCE, STEPS
from openpulid.mini.models import build_scheduler, predict
from openpulid.mini.train.distill import STUDENT_TIMESTEPS
from openpulid.training.pulid import TextConditioning


@dataclass(frozen=True)
class Rollouts:
    """N rollouts of the teacher from noise to image.

    Attributes:
        latents: (N, 5, C, s, s) float16, at the student's four timesteps and at the end.
        rows: (N,) the images whose captions were used.
        variants: (N,) the captions of these images.
    """

    latents: Tensor
    rows: Tensor
    variants: Tensor


@torch.no_grad()
def rollout(
    unet: Any,
    noise: Tensor,
    text: TextConditioning,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    order: int = 2,
    every: int = 5,
) -> Tensor:
    """Sample as the pipeline does.

    Args:
        unet: the U-Net.
        noise: (B, C, s, s).
        text: B encoded prompts.
        steps: number of sampling steps.
        guidance: classifier-free guidance scale; 1 disables it.
        order: of the solver.
        every: number of steps between the latents that are returned.

    Returns:
        (B, 1 + steps / every, C, s, s), from the noise to the image.
    """
    sampler = type(build_scheduler()).from_config(build_scheduler().config, solver_order=order)
    sampler.set_timesteps(steps, device=noise.device)
    is_guided = guidance != 1
    conditioning = add_unconditional(text) if is_guided else text
    x = noise
    trajectory = [noise]
    for index, t in enumerate(sampler.timesteps, 1):
        inputs = torch.cat([x, x]) if is_guided else x
        with autocast(noise.device):
            prediction = predict(unet, inputs, t.expand(len(inputs)), conditioning)
        if is_guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
        x = sampler.step(prediction, t, x, return_dict=False)[0]
        if index % every == 0:
            trajectory.append(x)
    return torch.stack(trajectory, 1)


@torch.no_grad()
def sample_rollouts(
    unet: Any, data: TrainSet, count: int, seconds: float, batch: int = 2048
) -> Rollouts:
    """Sample rollouts of the teacher with guidance, for random captions.

    Args:
        unet: the teacher.
        data: the captions.
        count: number of rollouts.
        seconds: time limit; there may be fewer rollouts, but at least one batch.
        batch: rollouts at a time.
    """
    device = data.latents.device
    start = time.monotonic()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    batch = min(batch, count)
    while len(parts) * batch < count and (not parts or time.monotonic() - start < seconds):
        rows = torch.randint(len(data.latents), (batch,), device=device)
        variants = torch.randint(data.tokens.shape[1], (batch,), device=device)
        noise = torch.randn(batch, *data.latents.shape[1:], device=device)
        text = data.text(rows, variants)
        trajectory = rollout(unet, noise, text, every=STEPS // STUDENT_TIMESTEPS)
        parts.append((trajectory.half(), rows, variants))
        synchronize(device)
    return Rollouts(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
