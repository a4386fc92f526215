"""SDXL, FLUX and the miniature with random weights, at the size of the published ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from openpulid.device import compute_dtype, training_dtype
from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.errors import OptionError
from openpulid.pipelines.memory_levels import find_level, place_pipeline
from openpulid.pipelines.memory_prediction import SDXL_UNET, SDXL_VAE
from openpulid.pipelines.presets import MINIATURE
from openpulid.training.pulid import FluxModel, FluxText, SDXLModel, TextConditioning

TINY_CLIP: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
TINY_T5: dict[str, Any] = {
    "vocab_size": 8,
    "d_model": 8,
    "d_kv": 8,
    "d_ff": 8,
    "num_layers": 1,
    "num_heads": 1,
}
"""Configurations of tiny text encoders."""


class _PipelineParts:
    """The parts of a pipeline that `SDXLModel` uses.

    There are no text encoders: they do not affect the cost of a step.
    """

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
        self.unet = unet
        self.vae = vae
        self.text_encoder = None
        self.text_encoder_2 = None
        self.scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)


class RandomSDXL(SDXLModel):
    """A base model of SDXL's architecture with random prompt embeddings of 77 tokens."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
        super().__init__(_PipelineParts(unet, vae))
        config = unet.config
        self.pooled_width = (
            config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        )

    def encode_text(
        self,
        prompts: Sequence[str],
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> TextConditioning:
        """Return random embeddings, twice as many if guided."""
        rows = len(prompts) * (1 + guided)
        like: dict[str, Any] = {"device": self.device, "dtype": self.unet.dtype}
        size = pixels or self.pixels
        height, width = size if isinstance(size, tuple) else (size, size)
        sizes = [float(height), float(width), 0.0, 0.0, float(height), float(width)]
        ids = torch.tensor([sizes], **like).expand(rows, -1)
        embeds = torch.randn(rows, 77, self.unet.config.cross_attention_dim, **like)
        return TextConditioning(embeds, torch.randn(rows, self.pooled_width, **like), ids)


class _FluxParts:
    """The parts of a pipeline that `FluxModel` uses, without text encoders."""

    def __init__(self, transformer: FluxTransformer2DModel, vae: AutoencoderKL) -> None:
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = None
        self.text_encoder_2 = None
        self.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)


class RandomFlux(FluxModel):
    """A base model of FLUX's architecture with random prompt embeddings."""

    def __init__(
        self, transformer: FluxTransformer2DModel, vae: AutoencoderKL, pixels: int, text_tokens: int
    ) -> None:
        parts = _FluxParts(transformer, vae)
        super().__init__(parts, pixels, max_sequence_length=text_tokens)

    def encode_text(
        self,
        prompts: Sequence[str],
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> FluxText:
        """Return random embeddings, twice as many if guided."""
        rows = len(prompts) * (1 + guided)
        config = self.transformer.config
        like: dict[str, Any] = {"device": self.device, "dtype": self.transformer.dtype}
        embeds = torch.randn(rows, self.max_sequence_length, config.joint_attention_dim, **like)
        return FluxText(embeds, torch.randn(rows, config.pooled_projection_dim, **like))


def dtype_of(name: str, device: torch.device, in_training: bool = False) -> torch.dtype:
    """Return the dtype in which a base model is used: the miniature in float32."""
    if name == "mini":
        return torch.float32
    is_sdxl = name == "sdxl" and not in_training
    return compute_dtype(device) if is_sdxl else training_dtype(device)


def random_base(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> RandomSDXL:
    """Build "mini" or "sdxl" at full size with random weights.

    Args:
        name: the base model.
        device: where it is built.
        dtype: of its weights.

    Raises:
        OptionError: an unknown name.
    """
    if name not in ("mini", "sdxl"):
        raise OptionError(f"base {name!r} is not available with random weights; use mini or sdxl.")
    with default_dtype(dtype), device:
        if name == "sdxl":
            unet = UNet2DConditionModel(**SDXL_UNET)
            vae = AutoencoderKL(**SDXL_VAE)
        else:
            unet = UNet2DConditionModel.from_config(_read_config("unet"))
            vae = PatchAutoencoderKL.from_config(_read_config("vae"))
    return RandomSDXL(unet, vae)  # not on the device: its noise schedule stays on the CPU


def _read_config(part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MINIATURE / "pipeline" / part / "config.json").read_text())
    return config


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build modules in this dtype, without an intermediate float32 copy."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def place_sdxl(base: RandomSDXL, level: str, device: torch.device) -> StableDiffusionXLPipeline:
    """Build a pipeline around a U-Net, at a memory level; its other parts are tiny.

    Args:
        base: the base model; its U-Net is on the CPU.
        level: one of `memory_levels.SDXL_LEVELS`.
        device: where it runs.
    """
    clip = CLIPTextConfig(**TINY_CLIP, projection_dim=8)
    encoders = CLIPTextModel(clip), CLIPTextModelWithProjection(clip)
    parts = (base.unet, base.pipe.scheduler)
    pipe = StableDiffusionXLPipeline(_tiny_vae(), *encoders, None, None, *parts)
    place_pipeline(pipe, find_level("sdxl", level), device)
    return pipe


def place_flux(
    transformer: FluxTransformer2DModel, level: str, device: torch.device
) -> FluxPipeline:
    """Build a pipeline around a transformer, at a memory level; its other parts are tiny.

    Args:
        transformer: it is on the CPU.
        level: one of `memory_levels.FLUX_LEVELS`.
        device: where it runs.
    """
    clip = CLIPTextModel(CLIPTextConfig(**TINY_CLIP))
    t5 = T5EncoderModel(T5Config(**TINY_T5))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, _tiny_vae(), clip, None, t5, None, transformer)
    place_pipeline(pipe, find_level("flux", level), device)
    return pipe


def _tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
