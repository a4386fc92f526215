"""Training of the autoencoder on the device.

First the complete autoencoder is trained, then the decoder alone on latents with small errors. A
decoder that has only seen exact latents shows the small errors of a base as blocks and blotches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
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
from openpulid.mini.accelerated.world import World
from openpulid.mini.train.autoencoder import pixel_weights

SMOOTH = 0.01
"""The Charbonnier distance is quadratic below this error."""
KL = 2e-4
NOISE = 0.2
"""Maximum deviation of the latents' error in the second phase, relative to that of the latents."""
JOINT_FRACTION = 0.55
"""Fraction of the time of the first phase."""


def create_autoencoder(
    world: World, channels: int = 20, widths: tuple[int, ...] = (32, 48, 96, 128)
) -> PatchAutoencoderKL:
    """Create an autoencoder with overlapping patches that starts as the best linear code.

    Args:
        world: the images.
        channels: latent channels.
        widths: channels per level.
    """
    vae = PatchAutoencoderKL(
        block_out_channels=widths,
        latent_channels=channels,
        sample_size=world.images.shape[-1],
        folded=1,
        overlap=4,
    )
    vae = vae.to(world.images.device)
    rows = _spaced_rows(world, 4000)
    vae.start_from(2 * world.images[rows].double() / 255 - 1)
    return vae


def _spaced_rows(world: World, count: int) -> Tensor:
    """Return up to `count` evenly spaced row numbers."""
    device = world.images.device
    return torch.linspace(0, len(world) - 1, min(count, len(world)), device=device).long()


def reconstruction(
    decoded: Tensor, images: Tensor, weight: Tensor, scales: int = 3
) -> dict[str, Tensor]:
    """Compute the weighted distances of pixels, and of slopes at several scales.

    Slopes (differences of neighbors) keep edges sharp. At half and a quarter of the size they
    prevent steps in smooth regions, where blocks are visible.

    Args:
        decoded: (B, 3, S, S) in [-1, 1].
        images: (B, 3, S, S) in [-1, 1].
        weight: (B, 1, S, S), mean 1.
        scales: number of scales.

    Returns:
        The scalars "pixels" and "slopes".
    """
    error = decoded.float() - images.float()
    pixels = (weight * (error.square() + SMOOTH**2).sqrt()).mean()
    slopes = error.new_zeros(())
    for scale in range(scales):
        right = (error[..., 1:] - error[..., :-1]) * weight[..., 1:]
        down = (error[..., 1:, :] - error[..., :-1, :]) * weight[..., 1:, :]
        slopes = slopes + right.abs().mean() + down.abs().mean()
        if scale + 1 < scales:
            error = avg_pool2d(error, 2)
            weight = avg_pool2d(weight, 2)
    return {"pixels": pixels, "slopes": 0.5 * slopes}


class _Steps:
    """The training steps of both phases."""

    def __init__(self, vae: PatchAutoencoderKL, world: World, batch: int) -> None:
        self.vae = vae
        self.world = world
        self.batch = batch
        self.device = world.images.device
        self.optimizer = self.reset_optimizer()

    def reset_optimizer(self) -> DeviceMuon:
        """Create the optimizer of all parameters that require gradients."""
        self.optimizer = DeviceMuon(self.vae.parameters(), weight_decay=0.01, adam=True)
        return self.optimizer

    def train_jointly(self) -> Losses:
        """Train encoder and decoder."""
        self.optimizer.zero_grad()
        images, weight = self._sample_batch()
        with autocast(self.device):
            latents = self.vae.encode(images).latent_dist
            mean = latents.mean.float()
            logvar = latents.logvar.float()
            std = latents.std.float()
            decoded = self.vae.decode(mean + std * torch.randn_like(mean)).sample
        losses = reconstruction(decoded, images, weight)
        losses["kl"] = KL * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return self._update(losses)

    def train_decoder(self) -> Losses:
        """Train the decoder on latents with small errors."""
        self.optimizer.zero_grad()
        images, weight = self._sample_batch()
        with autocast(self.device):
            with torch.no_grad():
                mean = self.vae.encode(images).latent_dist.mean.float()
            uniform = torch.rand(self.batch, 1, 1, 1, device=self.device)
            sigma = NOISE * uniform**2 * mean.square().mean().sqrt()
            decoded = self.vae.decode(mean + sigma * torch.randn_like(mean)).sample
        return self._update(reconstruction(decoded, images, weight))

    def _sample_batch(self) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.world), (self.batch,), device=self.device)
        images, masks, landmarks = self.world.rows(rows)
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        return images, pixel_weights(masks, landmarks)

    def _update(self, losses: dict[str, Tensor]) -> Losses:
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}


def fit(
    vae: PatchAutoencoderKL,
    world: World,
    seconds: float,
    *,
    batch: int = 64,
    lr: float = 1.2e-3,
    max_steps: int | None = None,
    is_captured: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> int:
    """Train an autoencoder in place, in two phases.

    Args:
        vae: the autoencoder.
        world: the images.
        seconds: duration.
        batch: images per step.
        lr: maximum learning rate.
        max_steps: maximum number of steps of each phase.
        is_captured: replay the steps as CUDA graphs.
        on_progress: called every few steps.

    Returns:
        The number of steps.
    """
    vae.to(memory_format=torch.channels_last).train()
    schedule = TimedSchedule(seconds, lr, warmup=50, decay=0.7)
    phases = _Steps(vae, world, batch)
    average = Average(vae, 0.998)
    step = RepeatedStep(phases.train_jointly, is_captured)
    steps = train(
        step,
        phases.optimizer,
        average,
        schedule,
        max_steps=max_steps,
        on_progress=on_progress,
        stop_fraction=JOINT_FRACTION,
    )
    del step  # frees the memory of its graph
    phases.optimizer.zero_grad()
    average.apply()  # the decoder is trained for this encoder

    for part in (vae.encoder, vae.quant_conv, vae.patch_in):
        part.requires_grad_(False)
    optimizer = phases.reset_optimizer()
    average = Average(vae, 0.998)
    step = RepeatedStep(phases.train_decoder, is_captured)
    steps = train(
        step,
        optimizer,
        average,
        schedule,
        max_steps=None if max_steps is None else steps + max_steps,
        on_progress=on_progress,
        first_step=steps,
    )
    optimizer.zero_grad()
    average.apply()
    vae.eval().requires_grad_(False)
    return steps


@torch.no_grad()
def encode(vae: PatchAutoencoderKL, images: Tensor) -> Tensor:
    """Encode images (B, 3, S, S) in [0, 1] to scaled latents (B, C, s, s) float32."""
    images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
    with autocast(images.device):
        latents = vae.encode(images).latent_dist.mode()
    return latents.float() * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: PatchAutoencoderKL, latents: Tensor, batch: int = 512) -> Tensor:
    """Decode scaled latents (B, C, s, s) to images (B, 3, S, S) in [0, 1], in float32."""
    scaling_factor = vae.config.scaling_factor
    parts = [vae.decode(part / scaling_factor).sample.float() for part in latents.split(batch)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def standardize(vae: PatchAutoencoderKL, world: World, count: int = 8192) -> None:
    """Set the scaling factor in place, so that the mean square of scaled latents is 1."""
    vae.register_to_config(scaling_factor=1.0)
    squares = [
        encode(vae, world.rows(rows)[0]).square().mean()
        for rows in _spaced_rows(world, count).split(512)
    ]
    vae.register_to_config(scaling_factor=1 / torch.stack(squares).mean().sqrt().item())


@torch.no_grad()
def evaluate(vae: PatchAutoencoderKL, held_out: World, count: int = 1024) -> dict[str, float]:
    """Measure the reconstruction of held-out images.

    Returns:
        `psnr` and `psnr_face` in dB, and `grid`: the steepness across 8-pixel borders relative to
        that of the original images; 1 means that no patches are visible.
    """
    errors = []
    face_errors = []
    decoded_steepness = []
    original_steepness = []
    for rows in torch.arange(min(count, len(held_out)), device=held_out.images.device).split(256):
        images, masks, _ = held_out.rows(rows)
        decoded = decode(vae, encode(vae, images))
        error = (decoded - images).square().mean(1, keepdim=True)
        face_pixels = masks.sum((1, 2, 3)).clamp(min=1)
        errors.append(error.mean((1, 2, 3)))
        face_errors.append((error * masks).sum((1, 2, 3)) / face_pixels)
        decoded_steepness.append(steepness(decoded))
        original_steepness.append(steepness(images))
    grid = torch.cat(decoded_steepness).mean() / torch.cat(original_steepness).mean()
    return {
        "psnr": _psnr(torch.cat(errors)),
        "psnr_face": _psnr(torch.cat(face_errors)),
        "grid": grid.item(),
    }


def _psnr(errors: Tensor) -> float:
    """Return the mean PSNR in dB of mean squared errors (B,)."""
    return -10 * errors.clamp(min=1e-10).log10().mean().item()


def steepness(images: Tensor, patch: int = 8) -> Tensor:
    """Compute the mean step across patch borders relative to the mean step elsewhere.

    Args:
        images: (B, 3, S, S).
        patch: width of a patch in pixels.

    Returns:
        (B,).
    """
    right = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 3))
    steps = (right + down) / 2
    is_border = torch.arange(1, images.shape[-1], device=images.device) % patch == 0
    return steps[:, is_border].mean(1) / steps[:, ~is_border].mean(1).clamp(min=1e-6)
