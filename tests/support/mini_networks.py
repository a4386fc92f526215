"""The smallest real networks that form a pipeline."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import get_peft_model_state_dict
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.mini.data.captions import Captions, token_ids
from openpulid.mini.models.flux import (
    FluxTextEncoders,
    build_flux_pipeline,
    build_t5,
    build_transformer,
)
from openpulid.mini.models.pipeline import TextEncoders, build_unet
from openpulid.mini.models.tokenizer import build_tokenizer
from openpulid.mini.train.clip import build_text_config
from openpulid.mini.train.flux_stages import FEW_STEP_LORA, LORA_FILE

PROMPTS = [
    "portrait, photo, smiling",
    "pencil sketch, a person, long hair",
    "portrait, poster, sad",
    "photo, a person",
]
CHANNELS = 4


def small_words() -> TextEncoders:
    torch.manual_seed(1)
    first = CLIPTextModel(build_text_config(build_tokenizer(), 32, layers=2))
    return TextEncoders(
        first, CLIPTextModelWithProjection(build_text_config(build_tokenizer(), 32, layers=2))
    )


def small_unet(seed: int = 2):
    torch.manual_seed(seed)
    return build_unet(CHANNELS, text_width=64, pooled=128, widths=(32, 32), size=12)


def small_vae() -> PatchAutoencoderKL:
    torch.manual_seed(3)
    return PatchAutoencoderKL(
        block_out_channels=(8, 8, 8, 8), latent_channels=CHANNELS, norm_num_groups=4
    ).eval()


def small_captions() -> Captions:
    """Build two captions for each of two images."""
    tokens = token_ids(build_tokenizer(), PROMPTS).reshape(2, 2, -1)
    return Captions(tokens.numpy().astype(np.uint8))


def small_flux_text() -> FluxTextEncoders:
    torch.manual_seed(4)
    tokenizer = build_tokenizer()
    clip = CLIPTextModel(build_text_config(tokenizer, 32, layers=1))
    t5 = build_t5(tokenizer, width=32, layers=1, heads=2)
    return FluxTextEncoders(clip, t5, tokenizer)


def small_transformer(channels: int = CHANNELS) -> FluxTransformer2DModel:
    torch.manual_seed(5)
    sizes = {"double": 2, "single": 2, "heads": 2, "head_width": 16}
    return build_transformer(channels, text_width=32, pooled=32, **sizes).eval()


def small_flux_pipeline(latent_patch: int = 1) -> FluxPipeline:
    """Build a pipeline whose transformer already predicts something."""
    transformer = small_transformer(CHANNELS // latent_patch**2)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    torch.nn.init.normal_(transformer.norm_out.linear.weight, std=0.1)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        layer = block.norm1.linear if hasattr(block, "norm1") else block.norm.linear
        torch.nn.init.normal_(layer.weight, std=0.1)
    vae = small_vae().with_latent_patch(latent_patch).requires_grad_(False)
    return build_flux_pipeline(transformer, vae, small_flux_text(), build_tokenizer())


def save_random_lora(transformer: FluxTransformer2DModel, folder: Path) -> None:
    """Write a student's LoRA with random weights."""
    student = deepcopy(transformer)
    student.add_adapter(FEW_STEP_LORA)
    layers = get_peft_model_state_dict(student)
    for value in layers.values():
        torch.nn.init.normal_(value, std=0.1)
    FluxPipeline.save_lora_weights(folder, layers, weight_name=LORA_FILE)
