"""Train the autoencoder on the device: first as a whole, then its decoder alone on latents that are a little wrong.

A decoder that has only seen exact latents shows a base's small errors as blocks and blotches. The second
phase shows it such errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.mini.accelerated.steps import (
    Average,
    DeviceMuon,
    Losses,
    RepeatedStep,
    TimedSchedule,
    autocast,
    train,
)
from openpulid.mini.accelerated.world import World
from openpulid.mini.train.autoencoder import importance

SMOOTH = 0.01
"""Below this error the Charbonnier distance is quadratic."""
KL = 2e-4
NOISE = 0.2
"""Largest deviation of the latents' error in the second phase, in units of the latents' own."""
JOINT = 0.55
"""Share of the time of the first phase."""


def build(
    world: World, channels: int = 20, widths: tuple[int, ...] = (32, 48, 96, 128)
) -> PatchAutoencoderKL:
    """Build an autoencoder without patch borders that begins as the best linear code of the images."""
    vae = PatchAutoencoderKL(
        block_out_channels=widths,
        latent_channels=channels,
        sample_size=world.images.shape[-1],
        folded=1,
        overlap=4,
    )
    vae = vae.to(world.images.device)
    rows = torch.linspace(
        0, len(world) - 1, min(4000, len(world)), device=world.images.device
    ).long()
    vae.start_from(2 * world.images[rows].double() / 255 - 1)
    return vae


def reconstruction(
    decoded: Tensor, images: Tensor, weight: Tensor, scales: int = 3
) -> dict[str, Tensor]:
    """Return named scalars: weighted distance of pixels, and of slopes at several scales.

    Slopes (differences of neighbors) keep edges sharp. At half and a quarter of the size they keep what is
    smooth free of steps, which is where blocks are seen.

    Args:
        decoded, images: (B, 3, S, S) in [-1, 1]; weight: (B, 1, S, S), mean 1.
    """
    error = decoded.float() - images.float()
    losses = {"pixels": (weight * (error.square() + SMOOTH**2).sqrt()).mean()}
    slopes = error.new_zeros(())
    for scale in range(scales):
        right = (error[..., 1:] - error[..., :-1]) * weight[..., 1:]
        down = (error[..., 1:, :] - error[..., :-1, :]) * weight[..., 1:, :]
        slopes = slopes + right.abs().mean() + down.abs().mean()
        if scale + 1 < scales:
            error, weight = avg_pool2d(error, 2), avg_pool2d(weight, 2)
    return losses | {"slopes": 0.5 * slopes}


def fit(
    vae: PatchAutoencoderKL,
    world: World,
    seconds: float,
    *,
    batch: int = 64,
    lr: float = 1.2e-3,
    most: int | None = None,
    captured: bool = False,
    watch: Callable[[int, float, dict[str, float]], None] = lambda step, share, losses: None,
) -> int:
    """Train in place for so many seconds, at most `most` steps in each of the two phases; return the steps."""
    device = world.images.device
    vae.to(memory_format=torch.channels_last).train()
    average = Average(vae, 0.998)
    schedule = TimedSchedule(seconds, lr, warmup=50, decay=0.7)

    def batch_of() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(world), (batch,), device=device)
        images, masks, landmarks = world.rows(rows)
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        return images, importance(masks, landmarks)

    def joint() -> Losses:
        optimizer.zero_grad()
        images, weight = batch_of()
        with autocast(device):
            latents = vae.encode(images).latent_dist
            mean, logvar, std = latents.mean.float(), latents.logvar.float(), latents.std.float()
            decoded = vae.decode(mean + std * torch.randn_like(mean)).sample
        losses = reconstruction(decoded, images, weight)
        losses["kl"] = KL * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def decoder_alone() -> Losses:
        optimizer.zero_grad()
        images, weight = batch_of()
        with autocast(device):
            with torch.no_grad():
                mean = vae.encode(images).latent_dist.mean.float()
            sigma = (
                NOISE * torch.rand(batch, 1, 1, 1, device=device) ** 2 * mean.square().mean().sqrt()
            )
            decoded = vae.decode(mean + sigma * torch.randn_like(mean)).sample
        losses = reconstruction(decoded, images, weight)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    optimizer = DeviceMuon(vae.parameters(), weight_decay=0.01, adam=True)
    step = RepeatedStep(joint, captured)
    steps = train(step, optimizer, average, schedule, most=most, watch=watch, until=JOINT)
    del step
    optimizer.zero_grad()
    average.apply()  # the decoder is trained for the encoder that stays
    for part in (vae.encoder, vae.quant_conv, vae.patch_in):
        part.requires_grad_(False)
    optimizer = DeviceMuon(vae.parameters(), weight_decay=0.01, adam=True)
    average = Average(vae, 0.998)
    step = RepeatedStep(decoder_alone, captured)
    most = None if most is None else steps + most
    steps = train(step, optimizer, average, schedule, most=most, watch=watch, first=steps)
    optimizer.zero_grad()
    average.apply()
    vae.eval().requires_grad_(False)
    return steps


@torch.no_grad()
def encode(vae: PatchAutoencoderKL, images: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> scaled latents (B, C, s, s), float32."""
    images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
    with autocast(images.device):
        latents = vae.encode(images).latent_dist.mode()
    return latents.float() * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: PatchAutoencoderKL, latents: Tensor, batch: int = 512) -> Tensor:
    """Scaled latents (B, C, s, s) -> images (B, 3, S, S) in [0, 1], in float32."""
    parts = [
        vae.decode(part / vae.config.scaling_factor).sample.float() for part in latents.split(batch)
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def standardize(vae: PatchAutoencoderKL, world: World, most: int = 8192) -> None:
    """Set the scaling factor, in place: scaled latents have a mean square of 1."""
    vae.register_to_config(scaling_factor=1.0)
    rows = torch.linspace(
        0, len(world) - 1, min(most, len(world)), device=world.images.device
    ).long()
    squares = [encode(vae, world.rows(part)[0]).square().mean() for part in rows.split(512)]
    vae.register_to_config(scaling_factor=1 / torch.stack(squares).mean().sqrt().item())


@torch.no_grad()
def figures(vae: PatchAutoencoderKL, held_out: World, most: int = 1024) -> Mapping[str, float]:
    """Return `psnr`, `psnr_face` in dB, and `grid`: how much steeper images are across 8-pixel borders than elsewhere.

    `grid` is relative to that of the world's own images; 1 means no visible patches.
    """
    whole, inside, steep, own = [], [], [], []
    for rows in torch.arange(min(most, len(held_out)), device=held_out.images.device).split(256):
        images, masks, _ = held_out.rows(rows)
        back = decode(vae, encode(vae, images))
        error = (back - images).square().mean(1, keepdim=True)
        whole.append(error.mean((1, 2, 3)))
        inside.append((error * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)).clamp(min=1))
        steep.append(steepness(back))
        own.append(steepness(images))
    psnr, face = (
        -10 * torch.cat(errors).clamp(min=1e-10).log10().mean().item() for errors in (whole, inside)
    )
    grid = torch.cat(steep).mean() / torch.cat(own).mean()
    return {"psnr": psnr, "psnr_face": face, "grid": grid.item()}


def steepness(images: Tensor, patch: int = 8) -> Tensor:
    """(B, 3, S, S) -> (B,) mean step across borders of patches, divided by the mean step elsewhere."""
    right = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 3))
    steps = (right + down) / 2
    border = torch.arange(1, images.shape[-1], device=images.device) % patch == 0
    return steps[:, border].mean(1) / steps[:, ~border].mean(1).clamp(min=1e-6)
