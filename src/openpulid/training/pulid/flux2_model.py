"""FLUX.2 klein as training uses it.

Shapes: as in `flux_model`. Latents are those of the transformer: squares of two by two are
normalized together, by the batch norm of the autoencoder, and then laid out as an image again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from openpulid.training.pulid.flux_model import PATCH, FluxModel, position_ids


@dataclass(frozen=True)
class Flux2Text:
    """Text of a FLUX.2 base.

    Attributes:
        embeds: (B, T, D) hidden states of three layers of Qwen3, next to each other.
        ids: (T, 4) positions: zero, zero, zero, index.
    """

    embeds: Tensor
    ids: Tensor


class Flux2Model(FluxModel):
    """A `BaseModel` of diffusers' `Flux2KleinPipeline`, of any size.

    Freezes the pipeline's networks and changes nothing else.

    Args:
        pipe: the pipeline.
        pixels: see `FluxModel`.
        num_steps: of a run; the pipeline shifts the noise levels less for more steps.
        options: further arguments of `FluxModel`.
    """

    def __init__(self, pipe: Any, pixels: int = 1024, num_steps: int = 50, **options: Any) -> None:
        self.num_steps = num_steps
        super().__init__(pipe, pixels, **options)

    def _log_shift(self, num_tokens: int) -> float:
        return compute_empirical_mu(num_tokens, self.num_steps)

    @torch.no_grad()
    def encode_text(
        self,
        prompts: Sequence[str],
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> Flux2Text:
        """Encode B prompts, without gradient; the size of the images is not read."""
        embeds, ids = self.pipe.encode_prompt(
            prompt=([""] * len(prompts) if guided else []) + list(prompts),
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return Flux2Text(embeds, ids[0])

    def _text_arguments(self, text: Any) -> dict[str, Tensor]:
        embeds = text.embeds.to(self.transformer.dtype)
        return {"encoder_hidden_states": embeds, "txt_ids": text.ids}

    def _position_ids(self, height: int, width: int) -> Tensor:
        return pad(position_ids(height, width), (0, 1))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to latents (B, c, h, w) in float32."""
        parameter = next(self.vae.parameters())
        latents = self.vae.encode((2 * images - 1).to(parameter)).latent_dist.mode().float()
        mean, std = self._statistics()
        return pixel_shuffle((pixel_unshuffle(latents, PATCH) - mean) / std, PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, c, h, w) to images (B, 3, H, W), about 0..1 and not clamped, with gradient."""
        mean, std = self._statistics()
        latents = pixel_shuffle(pixel_unshuffle(latents, PATCH) * std + mean, PATCH)
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of squares of latents, (4 c, 1, 1) each."""
        norm = self.vae.bn
        mean = norm.running_mean.float()[:, None, None]
        variance = norm.running_var.float()[:, None, None]
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()
