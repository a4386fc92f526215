"""The text-to-image networks of the miniature as the training of a base and its student uses them.

Everything that differs between SDXL and FLUX is behind `BaseNetwork`.
Shapes: B batch, c x h x w latents, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from openpulid.diffusion.flow_schedule import FlowSchedule
from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.mini.models import (
    FluxTextEncoders,
    TextEncoders,
    build_flow_scheduler,
    build_scheduler,
    predict,
)
from openpulid.training.pulid import FluxText, TextConditioning
from openpulid.training.pulid.flux_model import (
    PATCH,
    position_ids,
    predict_velocity,
    text_arguments,
)

CAPTION_DROPOUT = 0.1
"""Share of training images without their caption, for classifier-free guidance."""


class BaseNetwork(Protocol):
    """A text-to-image network in training, or the frozen teacher of a student.

    Attributes:
        schedule: the noise schedule.
        latent_shape: (c, h, w) of a square image.
    """

    schedule: Any
    latent_shape: tuple[int, int, int]

    def modules(self) -> Mapping[str, nn.Module]:
        """Return what trains."""

    def encode_text(
        self, tokens: Tensor, keep: Tensor | None = None, height: int = 0, width: int = 0
    ) -> Any:
        """Encode prompts for `predict`.

        Args:
            tokens: (B, L).
            keep: (B,) bool; unconditional where it is false.
            height: of the latents; 0 for that of `latent_shape`.
            width: of the latents, likewise.
        """

    def predict(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        """Run the network on (B, c, h, w) at timesteps (B,); returns float32, with gradient."""

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Map uniform numbers (B,) in [0, 1) to timesteps of the training."""

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return the weights (B,) of the loss at timesteps."""

    def start_sampler(self, steps: int, device: torch.device | None = None) -> Any:
        """Return diffusers' scheduler, set to this many steps, as the pipeline does."""

    def to_timesteps(self, times: Tensor) -> Tensor:
        """Convert timesteps of the sampler to those of `predict`."""


def warp_uniform_times(
    uniform: Tensor, uniform_share: float = 0.25, logit_mean: float = -0.8
) -> Tensor:
    """Map uniform numbers in [0, 1) to training times in [0, 1).

    A share of the times is uniform. The others are logit-normal. With uniform times half of the
    training would be spent where only the coarsest colors are visible through the noise; faces are
    decided below. Karras et al. (2022) and Esser et al. (2024) choose their times in the same way.

    Args:
        uniform: (B,) numbers.
        uniform_share: share of the times that are uniform.
        logit_mean: of the other times; -0.8 is a median of 0.31.

    Returns:
        (B,) times.
    """
    quantile = ((uniform - uniform_share) / (1 - uniform_share)).clamp(1e-4, 1 - 1e-4)
    normal = logit_mean + torch.special.ndtri(quantile.double())
    times = torch.where(
        uniform < uniform_share, uniform / uniform_share, torch.sigmoid(normal).float()
    )
    return times.clamp(max=1 - 1e-6)


class SDXLNetwork:
    """SDXL's U-Net with frozen text encoders; a `BaseNetwork`.

    Args:
        unet: the U-Net.
        text_encoders: the frozen text encoders.
        gamma: losses at a signal-to-noise ratio above `gamma` - 1 are scaled down to it. The little
            noise there cannot be distinguished from the image and would dominate the loss. Below it
            all times have the same weight. Min-SNR, in contrast, for v-prediction gives almost no
            weight to the first steps, in which colors and poses are decided.
        compiled: whether to compile the U-Net. Takes minutes once and makes it 1.4 times as fast on
            a CPU; requires a C++ compiler there.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoders: TextEncoders,
        gamma: float = 5.0,
        compiled: bool = False,
    ) -> None:
        self.unet = unet.to(memory_format=torch.channels_last)
        if next(unet.parameters()).device.type == "cpu":
            # On a CPU in float32, plain matrix products are 10% faster than fused attention.
            self.unet.set_attn_processor(AttnProcessor())
        self.network = torch.compile(self.unet, dynamic=False) if compiled else self.unet
        self.text_encoders = text_encoders
        self.gamma = gamma
        scheduler = build_scheduler()
        self.schedule = NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)
        side = unet.config.sample_size
        self.latent_shape = (unet.config.in_channels, side, side)

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the U-Net."""
        return {"unet": self.unet}

    def encode_text(
        self, tokens: Tensor, keep: Tensor | None = None, height: int = 0, width: int = 0
    ) -> TextConditioning:
        """Encode prompts, with the size of the images; without a prompt all is zero."""
        size = None
        if height and width:
            size = (self.text_encoders.size, self.text_encoders.size * width // height)
        return self.text_encoders(tokens, keep, size)

    def predict(self, x_t: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """Run the U-Net."""
        return predict(self.network, x_t, t, text)

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Map uniform numbers to timesteps, a quarter of which is uniform."""
        return self.schedule.sample_timesteps(warp_uniform_times(uniform))

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return the weights of timesteps, see `gamma`."""
        return (self.gamma / (self.schedule.snr(t) + 1)).clamp(max=1.0)

    def start_sampler(self, steps: int, device: torch.device | None = None) -> Any:
        """Return DPM-Solver++, set to this many steps."""
        sampler = build_scheduler()
        sampler.set_timesteps(steps, device=device)
        return sampler

    def to_timesteps(self, times: Tensor) -> Tensor:
        """Return the sampler's timesteps."""
        return times


class FluxNetwork:
    """FLUX.1's transformer with frozen CLIP and T5; a `BaseNetwork`.

    Args:
        transformer: the transformer.
        text_encoders: CLIP and T5.
        latent_side: height and width of the latents of a square image.
        compiled: whether to compile the blocks, see `SDXLNetwork`.
    """

    UNIFORM_SHARE = 0.15
    LOGIT_MEAN = 0.2
    """Median noise level 0.55: the faces of this base are decided between 0.35 and 0.7."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text_encoders: FluxTextEncoders,
        latent_side: int,
        compiled: bool = False,
    ) -> None:
        self.transformer = transformer
        self.text_encoders = text_encoders
        self.schedule = FlowSchedule()
        self.latent_shape = (transformer.config.in_channels // PATCH**2, latent_side, latent_side)
        if compiled:
            transformer.compile_repeated_blocks(dynamic=False)

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the transformer."""
        return {"transformer": self.transformer}

    def encode_text(
        self, tokens: Tensor, keep: Tensor | None = None, height: int = 0, width: int = 0
    ) -> FluxText:
        """Encode prompts; without a prompt it is the empty one."""
        return self.text_encoders(tokens, keep)

    def predict(
        self, x_t: Tensor, t: Tensor, text: FluxText, guidance: Tensor | None = None
    ) -> Tensor:
        """Run the transformer, with guidance (B,) if it has an embedding of it."""
        ids = position_ids(*(side // PATCH for side in x_t.shape[-2:]))
        arguments = text_arguments(text, self.transformer.dtype)
        return predict_velocity(
            self.transformer, x_t, t, img_ids=ids, guidance=guidance, **arguments
        )

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Map uniform numbers to noise levels, most of which are logit-normal."""
        return warp_uniform_times(uniform, self.UNIFORM_SHARE, self.LOGIT_MEAN)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return ones: a flow model weighs noise levels by how often it draws them."""
        return torch.ones_like(t)

    def start_sampler(self, steps: int, device: torch.device | None = None) -> Any:
        """Return the flow scheduler, set to evenly spaced noise levels from 1."""
        sampler = build_flow_scheduler()
        sampler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), device=device)
        return sampler

    def to_timesteps(self, times: Tensor) -> Tensor:
        """Convert the scheduler's timesteps to noise levels."""
        return times / 1000
