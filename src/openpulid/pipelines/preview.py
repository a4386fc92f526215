"""Previews of images that are not finished: the latents of a step, decoded at a low resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

PREVIEW_SIDE = 256
"""Longest side of a preview in pixels. Decoding takes memory and time in proportion to the area."""


@dataclass(frozen=True, eq=False)
class NoisyLatents:
    """Latents after a step: signal * clean latents + noise * Gaussian noise.

    Attributes:
        latents: (B, C, H, W); FLUX: (B, T, C).
        signal: weight of the clean latents.
        noise: weight of the noise.
    """

    latents: Tensor
    signal: float = 1.0
    noise: float = 0.0

    @classmethod
    def read(cls, scheduler: Any, latents: Tensor) -> NoisyLatents:
        """Read the noise level of latents from the scheduler that has just stepped."""
        levels = getattr(scheduler, "levels", getattr(scheduler, "sigmas", None))
        index = getattr(scheduler, "step_index", None)
        if levels is None or index is None or index >= len(levels):
            return cls(latents)
        sigma = float(levels[index])
        if type(scheduler).__name__.startswith("FlowMatch"):
            return cls(latents, 1 - sigma, sigma)
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # keeps the variance
            signal = (sigma**2 + 1) ** -0.5
            return cls(latents, signal, sigma * signal)
        return cls(latents, 1.0, sigma)

    def estimate_clean(self, previous: NoisyLatents | None) -> Tensor:
        """Estimate the clean latents, as if the step had added no new noise.

        Args:
            previous: the latents before the step. Without them, the noise stays in the estimate.
        """
        latents = self.latents.float()
        if previous is None or not previous.noise > self.noise:
            return latents / (self.signal**2 + self.noise**2) ** 0.5
        ratio = self.noise / previous.noise
        clean = latents - ratio * previous.latents.float()
        return clean / (self.signal - ratio * previous.signal)


@torch.no_grad()
def decode_preview(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Image.Image:
    """Decode the first image of a batch of latents at a low resolution.

    Args:
        pipe: a pipeline of SDXL or FLUX.
        latents: clean latents, scaled as the network sees them; (B, C, H, W), FLUX: (B, T, C).
        size: width and height of the generated image in pixels.
    """
    width, height = size
    latents = latents[:1]
    if latents.ndim == 3:  # FLUX: a token is a square of two by two latents
        if hasattr(pipe.vae, "bn"):  # FLUX.2 normalizes tokens
            norm = pipe.vae.bn
            std = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt()
            latents = latents * std.to(latents) + norm.running_mean.to(latents)
        side = 2 * pipe.vae_scale_factor
        latents = rearrange(
            latents, "b (h w) (c p q) -> b c (h p) (w q)", h=height // side, p=2, q=2
        )
    scale = PREVIEW_SIDE / max(width, height)
    if scale < 1:
        latents = interpolate(latents, scale_factor=scale, mode="area")
    vae = pipe.vae
    dtype = vae.dtype
    # SDXL's autoencoder overflows in float16
    needs_float32 = dtype == torch.float16 and vae.config.get("force_upcast", False)
    if needs_float32:
        vae.to(torch.float32)
    try:
        shift = vae.config.get("shift_factor") or 0.0
        latents = latents / vae.config.get("scaling_factor", 1.0) + shift
        pixels = vae.decode(latents.to(pipe._execution_device, vae.dtype), return_dict=False)[0]
    finally:
        if needs_float32:
            vae.to(dtype)
    image: Image.Image = pipe.image_processor.postprocess(pixels.nan_to_num(), output_type="pil")[0]
    return image
