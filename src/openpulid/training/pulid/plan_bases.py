"""The base models of full size on the meta device, for the plan of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn

from openpulid.pipelines.memory_prediction import (
    FLUX_VAE,
    KLEIN_TRANSFORMER,
    SDXL_UNET,
    SDXL_VAE,
    weight_sizes,
)
from openpulid.training.pulid.flux2_model import Flux2Model, Flux2Text
from openpulid.training.pulid.flux_model import FluxModel, FluxText
from openpulid.training.pulid.models import BaseModel, SDXLModel, TextConditioning
from openpulid.training.pulid.qwen_image_model import QwenImageModel, QwenImageText
from openpulid.training.pulid.recipe import DEFAULT_PIXELS, Recipe
from openpulid.training.pulid.z_image_model import ZImageModel, ZImageText

SDXL_TEXT_BYTES = 2 * (123_060_480 + 694_659_840)
"""CLIP ViT-L and OpenCLIP ViT-bigG in bfloat16."""

QWEN_VL_BYTES = 2 * 8_292_166_656
"""Qwen2.5-VL 7B in bfloat16."""


@dataclass(frozen=True)
class FullSizeBase:
    """A base model of full size on the meta device.

    Attributes:
        model: as training uses it.
        text: of one prompt, as the model's `predict` takes it.
        text_bytes: of the text encoders.
    """

    model: BaseModel
    text: Any
    text_bytes: int


def _sdxl(recipe: Recipe) -> FullSizeBase:
    schedule = SimpleNamespace(prediction_type="epsilon")
    pipe = SimpleNamespace(
        unet=UNet2DConditionModel(**SDXL_UNET).bfloat16(),
        vae=AutoencoderKL(**SDXL_VAE).bfloat16(),
        text_encoder=None,
        text_encoder_2=None,
        vae_scale_factor=8,
        scheduler=SimpleNamespace(alphas_cumprod=torch.linspace(1, 0, 1000), config=schedule),
    )
    text = TextConditioning(torch.empty(1, 77, 2048), torch.empty(1, 1280), torch.empty(1, 6))
    return FullSizeBase(SDXLModel(pipe), text, SDXL_TEXT_BYTES)


def _flux(recipe: Recipe) -> FullSizeBase:
    transformer = FluxTransformer2DModel(guidance_embeds=True).bfloat16()
    vae = AutoencoderKL(**FLUX_VAE, shift_factor=0.1159)
    model = FluxModel(_flow_pipe(transformer, vae), DEFAULT_PIXELS)
    text = FluxText(torch.empty(1, recipe.text_tokens, 4096), torch.empty(1, 768))
    return FullSizeBase(model, text, weight_sizes()["text"])


def _klein(recipe: Recipe) -> FullSizeBase:
    transformer = Flux2Transformer2DModel(**KLEIN_TRANSFORMER).bfloat16()
    model = Flux2Model(_flow_pipe(transformer, AutoencoderKLFlux2()), DEFAULT_PIXELS)
    width = KLEIN_TRANSFORMER["joint_attention_dim"]
    text = Flux2Text(torch.empty(1, recipe.text_tokens, width), torch.zeros(recipe.text_tokens, 4))
    return FullSizeBase(model, text, weight_sizes("flux2")["text"])


def _z_image(recipe: Recipe) -> FullSizeBase:
    transformer = ZImageTransformer2DModel().bfloat16()
    vae = AutoencoderKL(**FLUX_VAE, shift_factor=0.1159)
    model = ZImageModel(_flow_pipe(transformer, vae), DEFAULT_PIXELS)
    text = ZImageText([torch.empty(recipe.text_tokens, transformer.config.cap_feat_dim)])
    # its text encoder is that of FLUX.2 klein
    return FullSizeBase(model, text, weight_sizes("flux2")["text"])


def _qwen_image(recipe: Recipe) -> FullSizeBase:
    transformer = QwenImageTransformer2DModel().bfloat16()
    model = QwenImageModel(_flow_pipe(transformer, AutoencoderKLQwenImage()), DEFAULT_PIXELS)
    embeds = torch.empty(1, recipe.text_tokens, transformer.config.joint_attention_dim)
    return FullSizeBase(model, QwenImageText(embeds, None), QWEN_VL_BYTES)


def _flow_pipe(transformer: nn.Module, vae: nn.Module) -> Any:
    """Return what the models read of a pipeline."""
    config = SimpleNamespace(use_dynamic_shifting=False, shift=1.0)
    return SimpleNamespace(
        transformer=transformer,
        vae=vae.bfloat16(),
        vae_scale_factor=8,
        scheduler=SimpleNamespace(config=config),
    )


BASES: dict[str, Callable[[Recipe], FullSizeBase]] = {
    "sdxl": _sdxl,
    "flux": _flux,
    "flux2-klein": _klein,
    "z-image": _z_image,
    "qwen-image": _qwen_image,
}
"""Builders of the base models, by `Recipe.base`; they run on the meta device."""
