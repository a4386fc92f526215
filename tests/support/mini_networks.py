"""The smallest real networks that form a pipeline."""

from __future__ import annotations

import numpy as np
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.mini.data.captions import Captions, token_ids
from openpulid.mini.models.pipeline import TextEncoders, build_unet
from openpulid.mini.models.tokenizer import build_tokenizer
from openpulid.mini.train.clip import build_text_config

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
