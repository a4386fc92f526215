"""Base models as training uses them: encode prompts, predict, decode.

Everything that differs between SDXL, FLUX and their small variants is behind `BaseModel`.
Shapes: B batch, c x h x w latents, L image positions, T tokens of width D, H x W images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openpulid.diffusion.flow_schedule import FlowSchedule
from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.methods.pulid import cross_attentions


@dataclass(frozen=True)
class TextConditioning:
    """Conditioning of an SDXL-family base.

    Attributes:
        embeds: (B, T, D) token embeddings.
        pooled: (B, P) pooled embedding.
        time_ids: (B, 6) size conditioning, or None.
    """

    embeds: Tensor
    pooled: Tensor
    time_ids: Tensor | None = None


@dataclass(frozen=True)
class AttentionQK:
    """Queries and keys of one cross-attention layer.

    Attributes:
        query: (B, heads, L, d) of the image positions.
        key: (B, heads, T, d) of the text tokens.
    """

    query: Tensor
    key: Tensor


class BaseModel(Protocol):
    """A frozen text-to-image model as training uses it.

    Attributes:
        pipe: an adapter is attached to it.
        pixels: width of the base's own images.
        checkpoints_blocks: whether a rollout is recomputed block by block instead of call by call.
            FLUX's hooks count the calls of the transformer, so no call may be repeated.
    """

    pipe: Any
    pixels: int
    checkpoints_blocks: bool

    @property
    def schedule(self) -> NoiseSchedule | FlowSchedule:
        """The noise schedule."""

    @property
    def network(self) -> Any:
        """The U-Net or transformer."""

    @property
    def blocks(self) -> list[nn.Module]:
        """The parts of the network that compute one after the other."""

    @property
    def device(self) -> torch.device:
        """The device of latents."""

    def latent_shape(self, pixels: int | None = None) -> tuple[int, int, int]:
        """Return (c, h, w) of a square image's latents; by default of the base's own size."""

    def encode_text(
        self,
        prompts: Sequence[str],
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> Any:
        """Encode B prompts for `predict`, without gradient.

        Args:
            prompts: B strings.
            pixels: side of square images, or height and width; by default the base's own.
            guided: return 2 B rows, first those of the empty prompt.
        """

    def predict(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        """Run the network on (B, c, h, w) at timesteps (B,); returns float32, with gradient."""

    def capture_attention(self) -> AbstractContextManager[list[AttentionQK]]:
        """Collect queries and keys of every cross-attention layer in `predict`, with gradient."""

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to latents (B, c, h, w) in float32."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, c, h, w) to images (B, 3, H, W), about 0..1 and not clamped, with gradient."""


class SDXLModel:
    """A `BaseModel` of diffusers' `StableDiffusionXLPipeline` family, of any size.

    Freezes the pipeline's networks and changes nothing else.
    """

    checkpoints_blocks = False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.unet = pipe.unet
        self.vae = pipe.vae
        for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        self.pixels = pipe.unet.config.sample_size * pipe.vae_scale_factor
        scheduler = pipe.scheduler
        self.schedule = NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    @property
    def device(self) -> torch.device:
        """The device of the U-Net."""
        return self.unet.device

    @property
    def network(self) -> Any:
        """The U-Net."""
        return self.unet

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the U-Net."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def latent_shape(self, pixels: int | None = None) -> tuple[int, int, int]:
        """Return (c, h, w) of a square image's latents; by default of the base's own size."""
        side = pixels // self.pipe.vae_scale_factor if pixels else self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    @torch.no_grad()
    def encode_text(
        self,
        prompts: Sequence[str],
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> TextConditioning:
        """Encode B prompts, without gradient; `pixels` is SDXL's size conditioning."""
        return self.encode_text_with_gradient(prompts, pixels=pixels, guided=guided)

    def encode_text_with_gradient(
        self,
        prompts: Sequence[str],
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> TextConditioning:
        """Encode B prompts as `encode_text`, with the gradient to what text encoders read."""
        embeds, empty_embeds, pooled, empty_pooled = self.pipe.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        if guided:
            embeds = torch.cat([empty_embeds, embeds])
            pooled = torch.cat([empty_pooled, pooled])
        size = pixels or self.pixels
        height, width = size if isinstance(size, tuple) else (size, size)
        time_ids = torch.tensor(
            [[height, width, 0, 0, height, width]], dtype=embeds.dtype, device=self.device
        )
        return TextConditioning(embeds, pooled, time_ids.expand(len(embeds), -1))

    def predict(self, x_t: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """Run the U-Net on (B, c, h, w) at timesteps (B,); returns float32, with gradient."""
        dtype = self.unet.dtype
        added = {"text_embeds": text.pooled.to(dtype), "time_ids": text.time_ids}
        output = self.unet(
            x_t.to(dtype),
            t,
            encoder_hidden_states=text.embeds.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return output[0].float()

    @contextmanager
    def capture_attention(self) -> Iterator[list[AttentionQK]]:
        """Collect queries and keys of every cross-attention layer while open, in call order."""
        attention: list[AttentionQK] = []
        queries: dict[str, Tensor] = {}

        def store_query(name: str) -> Any:
            return lambda layer, args, output: queries.__setitem__(name, output)

        def store_pair(name: str, heads: int) -> Any:
            def hook(layer: Any, args: Any, key: Tensor) -> None:
                query = queries.pop(name).unflatten(-1, (heads, -1)).transpose(1, 2)
                key = key.unflatten(-1, (heads, -1)).transpose(1, 2)
                attention.append(AttentionQK(query, key))

            return hook

        with ExitStack() as stack:
            for name, layer in cross_attentions(self.unet).items():
                query_hook = layer.to_q.register_forward_hook(store_query(name))
                key_hook = layer.to_k.register_forward_hook(store_pair(name, layer.heads))
                stack.callback(query_hook.remove)
                stack.callback(key_hook.remove)
            yield attention

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to latents (B, c, h, w) in float32."""
        parameter = next(self.vae.parameters())
        latents = self.vae.encode((2 * images - 1).to(parameter)).latent_dist.mode().float()
        statistics = self._latent_statistics(latents)
        if statistics is not None:
            mean, std = statistics
            latents = (latents - mean) / std
        return latents * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, c, h, w) to images (B, 3, H, W), about 0..1 and not clamped, with gradient."""
        latents = latents / self.vae.config.scaling_factor
        statistics = self._latent_statistics(latents)
        if statistics is not None:
            mean, std = statistics
            latents = latents * std + mean
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return mean and standard deviation of each channel, (1, c, 1, 1), if the VAE has them."""
        config = self.vae.config
        if getattr(config, "latents_mean", None) is None:
            return None
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1).to(latents)
        std = torch.tensor(config.latents_std).view(1, -1, 1, 1).to(latents)
        return mean, std
