"""Training of the base's U-Net and of its four-step student, on a `TrainSet`."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from openpulid.mini.accelerated.rollouts import Rollouts, sample_rollouts
from openpulid.mini.accelerated.steps import (
    Average,
    DeviceMuon,
    Losses,
    OnProgress,
    RepeatedStep,
    TimedSchedule,
    autocast,
    ignore_progress,
    train,
)
from openpulid.mini.accelerated.train_set import TrainSet
from openpulid.mini.models import TextEncoders, build_scheduler, build_unet, predict
from openpulid.mini.train.distill import STUDENT_TIMESTEPS, StudentSchedule
from openpulid.mini.train.networks import CAPTION_DROPOUT, warp_uniform_times
from openpulid.training.pulid import TextConditioning

WIDTHS = (128, 160, 160)
"""Channels of the U-Net's levels: 13.6 M parameters. A latent position covers 192 pixel values, for
which 64 channels were too few."""
FACE_WEIGHT = 3.0
GAMMA = 5.0
"""As `SDXLNetwork.gamma`: above this signal-to-noise ratio + 1, the loss is scaled down to it."""

OnBaseProgress = Callable[[int, float, dict[str, float], Average], None]
"""As `OnProgress`, with the average of the weights."""


def _ignore_base_progress(
    step: int, fraction: float, losses: dict[str, float], average: Average
) -> None:
    """Do nothing."""


class DeviceSchedule:
    """The pipeline's noise schedule as tables on the device.

    Args:
        device: of the tables.
    """

    def __init__(self, device: torch.device) -> None:
        alphas = build_scheduler().alphas_cumprod.double()
        self.steps = len(alphas)
        self.signal = alphas.sqrt().float().to(device)
        self.sigma = (1 - alphas).sqrt().float().to(device)
        snr = alphas / (1 - alphas)
        self.weight = (GAMMA / (snr + 1)).clamp(max=1.0).float().to(device)

    def sample_timesteps(self, batch: int, device: torch.device) -> Tensor:
        """Sample (batch,) timesteps, one from each of `batch` equal spans of training times."""
        uniform = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        return (warp_uniform_times(uniform).double() * self.steps).long()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of image and noise at timesteps t (B,), (B, 1, 1, 1) each."""
        return self.signal[t][:, None, None, None], self.sigma[t][:, None, None, None]


def create_unet(
    data: TrainSet, text_encoders: TextEncoders, widths: tuple[int, ...] = WIDTHS
) -> Any:
    """Create an untrained U-Net for these latents and text encoders, on the latents' device."""
    channels = data.latents.shape[1]
    size = data.latents.shape[-1]
    pooled = text_encoders.second.config.projection_dim
    unet = build_unet(channels, text_encoders.width, pooled, widths, size=size)
    return unet.to(data.latents.device, memory_format=torch.channels_last)


def base_step(
    network: Any, optimizer: DeviceMuon, data: TrainSet, batch: int
) -> Callable[[], Losses]:
    """Create a training step of the base: v-prediction with more weight on faces.

    Args:
        network: the U-Net, possibly compiled.
        optimizer: of the U-Net's parameters.
        data: what to train on.
        batch: images per step.
    """
    device = data.latents.device
    schedule = DeviceSchedule(device)
    count, variants = data.tokens.shape[:2]

    def step() -> Losses:
        optimizer.zero_grad()
        rows = torch.randint(count, (batch,), device=device)
        clean = data.latents[rows].float()
        faces = data.faces[rows].float()
        text = data.text(rows, torch.randint(variants, (batch,), device=device))
        keep = (torch.rand(batch, device=device) >= CAPTION_DROPOUT).float()
        text = TextConditioning(
            text.embeds * keep[:, None, None], text.pooled * keep[:, None], text.time_ids
        )
        t = schedule.sample_timesteps(batch, device)
        signal, sigma = schedule.coefficients(t)
        noise = torch.randn_like(clean)
        with autocast(device):
            prediction = predict(network, signal * clean + sigma * noise, t, text)
        error = (prediction - (signal * noise - sigma * clean)).square()
        weight = 1 + (FACE_WEIGHT - 1) * faces
        error = error * (weight / weight.mean(dim=(1, 2, 3), keepdim=True))
        loss = (error.mean((1, 2, 3)) * schedule.weight[t]).mean()
        loss.backward()
        norm = optimizer.step()
        return {"diffusion": loss.detach(), "norm": norm.detach()}

    return step


def student_step(
    network: Any, optimizer: DeviceMuon, rollouts: Rollouts, data: TrainSet, batch: int
) -> Callable[[], Losses]:
    """Create a training step of the student: from one of its timesteps to the next in one step.

    Args:
        network: the student, possibly compiled.
        optimizer: of the student's parameters.
        rollouts: of the teacher.
        data: the captions of the rollouts.
        batch: samples per step.
    """
    device = data.latents.device
    schedule = StudentSchedule.for_unet()
    times = schedule.times.to(device)
    signals = schedule.signal.to(device)
    sigmas = schedule.noise.to(device)

    def step() -> Losses:
        optimizer.zero_grad()
        rows = torch.randint(len(rollouts.latents), (batch,), device=device)
        index = torch.randint(STUDENT_TIMESTEPS, (batch,), device=device)
        x = rollouts.latents[rows, index].float()
        x_next = rollouts.latents[rows, index + 1].float()
        a = signals[index][:, None, None, None]
        s = sigmas[index][:, None, None, None]
        a_next = signals[index + 1][:, None, None, None]
        s_next = sigmas[index + 1][:, None, None, None]
        target = (x_next - (a_next * a + s_next * s) * x) / (s_next * a - a_next * s)
        text = data.text(rollouts.rows[rows], rollouts.variants[rows])
        with autocast(device):
            prediction = predict(network, x, times[index], text)
        error = (prediction - target).square().mean((1, 2, 3))
        loss = (error * torch.maximum(a**2, s**2).flatten()).mean()
        loss.backward()
        norm = optimizer.step()
        return {"distillation": loss.detach(), "norm": norm.detach()}

    return step


def fit_base(
    unet: Any,
    data: TrainSet,
    seconds: float,
    *,
    compiled_unet: Any = None,
    is_captured: bool = False,
    batch: int = 512,
    lr: float = 3e-3,
    max_steps: int | None = None,
    on_progress: OnBaseProgress = _ignore_base_progress,
    log: Callable[[str], None] = print,
) -> tuple[int, Any]:
    """Train a base in place. It ends with the average of its weights.

    Args:
        unet: the U-Net.
        data: what to train on.
        seconds: duration, including the time for compiling and capturing.
        compiled_unet: the same U-Net, compiled.
        is_captured: replay the step as a CUDA graph.
        batch: images per step.
        lr: maximum learning rate.
        max_steps: maximum number of steps.
        on_progress: called every few steps.
        log: receives messages.

    Returns:
        The number of steps, and the network that ran them: `unet` itself if compiling failed.
    """
    unet.train().requires_grad_(True)
    start = time.monotonic()
    # a compiled module has no truth value: its __len__ raises TypeError
    network = unet if compiled_unet is None else compiled_unet
    optimizer = DeviceMuon(unet.parameters(), weight_decay=0.1)
    average = Average(unet, 0.997)
    try:
        base_step(network, optimizer, data, batch)()  # at learning rate 0
    except Exception as error:
        if network is unet:
            raise
        log(f"the U-Net is not compiled: {type(error).__name__}: {str(error)[:500]}")
        network = unet
    step = RepeatedStep(base_step(network, optimizer, data, batch), is_captured)
    setup_seconds = time.monotonic() - start
    log(
        f"base: the step is ready after {setup_seconds:.1f} s, "
        f"compiled: {network is not unet}, captured: {is_captured}"
    )
    schedule = TimedSchedule(max(1.0, seconds - setup_seconds), lr, warmup=100, decay=0.6)
    steps = train(
        step,
        optimizer,
        average,
        schedule,
        max_steps=max_steps,
        on_progress=lambda index, fraction, losses: on_progress(index, fraction, losses, average),
    )
    optimizer.zero_grad()
    average.apply()
    unet.eval()
    return steps, network


def fit_student(
    unet: Any,
    data: TrainSet,
    seconds: float,
    *,
    compiled_unet: Any = None,
    is_captured: bool = False,
    count: int = 32768,
    rollout_fraction: float = 0.4,
    batch: int = 512,
    lr: float = 1e-3,
    max_steps: int | None = None,
    on_progress: OnProgress = ignore_progress,
    log: Callable[[str], None] = print,
) -> int:
    """Turn a trained base into its student, in place.

    Args:
        unet: the base.
        data: the captions.
        seconds: duration, including the teacher's rollouts.
        compiled_unet: the same U-Net, compiled.
        is_captured: replay the step as a CUDA graph.
        count: number of rollouts of the teacher.
        rollout_fraction: fraction of the time after which no more rollouts are sampled.
        batch: samples per step.
        lr: maximum learning rate.
        max_steps: maximum number of steps.
        on_progress: called every few steps.
        log: receives messages.

    Returns:
        The number of steps.
    """
    start = time.monotonic()
    unet.eval()
    rollouts = sample_rollouts(unet, data, count, rollout_fraction * seconds)
    log(f"{len(rollouts.latents)} rollouts in {time.monotonic() - start:.1f} s")
    unet.train().requires_grad_(True)
    optimizer = DeviceMuon(unet.parameters(), weight_decay=0.01)
    average = Average(unet, 0.995)
    network = unet if compiled_unet is None else compiled_unet
    step = RepeatedStep(student_step(network, optimizer, rollouts, data, batch), is_captured)
    seconds_left = seconds - (time.monotonic() - start)
    schedule = TimedSchedule(max(1.0, seconds_left), lr, warmup=50, decay=0.7)
    steps = train(step, optimizer, average, schedule, max_steps=max_steps, on_progress=on_progress)
    optimizer.zero_grad()
    average.apply()
    unet.eval()
    return steps


def frozen_copy(unet: Any) -> Any:
    """Return a copy in eval mode that requires no gradients."""
    return deepcopy(unet).eval().requires_grad_(False)
