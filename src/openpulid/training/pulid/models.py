"""A base model as training sees it: it can read prompts, predict, and decode.

Whatever else differs between SDXL, FLUX and their small siblings stays behind `Base`. Shapes: B batch, c x h x w latents,
T tokens of width D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.methods.pulid.sdxl_attention import cross_attentions


@dataclass(frozen=True)
class TextConditioning:
    """What an SDXL-family base is told: token embeddings (B, T, D), pooled (B, P), size conditioning (B, 6)
    or None."""

    embeds: Tensor
    pooled: Tensor
    time_ids: Tensor | None = None


@dataclass(frozen=True)
class AttentionQK:
    """What one cross-attention layer asked and was offered: image queries (B, h, L, d), text keys (B, h, T, d)."""

    query: Tensor
    key: Tensor


class BaseModel(Protocol):
    """A frozen text-to-image model as training sees it."""

    schedule: NoiseSchedule
    pipe: Any  # what an adapter is attached to

    @property
    def device(self) -> torch.device:
        """Where latents are expected."""

    def shape(self, pixels: int | None = None) -> tuple[int, int, int]:
        """(c, h, w) of the latents of a square picture; by default of the base's own size."""

    def encode_text(
        self, prompts: Sequence[str], *, pixels: int | None = None, guided: bool = False
    ) -> Any:
        """B prompts -> whatever `predict` takes; without gradient. Guided: 2 B, first those of no words."""

    def predict(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        """(B, c, h, w) at times t (B,) -> the network's output (B, c, h, w) in float32, with gradient."""

    def watch(self) -> AbstractContextManager[list[AttentionQK]]:
        """While open, every `predict` appends what its cross-attention layers see, with gradient."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> pictures (B, 3, H, W), about 0..1 and not clamped, with gradient."""


class SDXLModel:
    """Any pipeline of diffusers' `StableDiffusionXLPipeline` family, of any size. Freezes its networks,
    changes nothing else."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.unet, self.vae = pipe, pipe.unet, pipe.vae
        for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        scheduler = pipe.scheduler
        self.schedule = NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def shape(self, pixels: int | None = None) -> tuple[int, int, int]:
        side = pixels // self.pipe.vae_scale_factor if pixels else self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    @torch.no_grad()
    def encode_text(
        self, prompts: Sequence[str], *, pixels: int | None = None, guided: bool = False
    ) -> TextConditioning:
        """`pixels` is what SDXL is told of the picture's size; by default its own."""
        embeds, nothing, pooled, none_pooled = self.pipe.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        if guided:
            embeds, pooled = torch.cat([nothing, embeds]), torch.cat([none_pooled, pooled])
        side = pixels or self.unet.config.sample_size * self.pipe.vae_scale_factor
        time_ids = torch.tensor(
            [[side, side, 0, 0, side, side]], dtype=embeds.dtype, device=self.device
        )
        return TextConditioning(embeds, pooled, time_ids.expand(len(embeds), -1))

    def predict(self, x_t: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
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
    def watch(self) -> Iterator[list[AttentionQK]]:
        seen: list[AttentionQK] = []
        asked: dict[str, Tensor] = {}

        def query(place: str) -> Any:
            return lambda layer, args, output: asked.__setitem__(place, output)

        def key(place: str, heads: int) -> Any:
            def note(layer: Any, args: Any, output: Tensor) -> None:
                both = (
                    x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (asked.pop(place), output)
                )
                seen.append(AttentionQK(*both))

            return note

        with ExitStack() as undo:
            for place, layer in cross_attentions(self.unet).items():
                undo.callback(layer.to_q.register_forward_hook(query(place)).remove)
                undo.callback(layer.to_k.register_forward_hook(key(place, layer.heads)).remove)
            yield seen

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> latents (B, c, h, w) in float32."""
        config, parameter = self.vae.config, next(self.vae.parameters())
        latents = self.vae.encode((2 * pictures - 1).to(parameter)).latent_dist.mode().float()
        if getattr(config, "latents_mean", None) is not None:
            mean, std = (
                torch.tensor(v).view(1, -1, 1, 1).to(latents)
                for v in (config.latents_mean, config.latents_std)
            )
            latents = (latents - mean) / std
        return latents * config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        latents = latents / config.scaling_factor
        if getattr(config, "latents_mean", None) is not None:
            mean, std = (
                torch.tensor(v).view(1, -1, 1, 1).to(latents)
                for v in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean
        picture = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return picture.float() / 2 + 0.5
