"""Random identities, an adapter with a visible effect, and a short run of a tiny pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from openpulid.identity.identity import Identity
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.sdxl import PuLID

STEPS = 3


def someone(seed: int, photos: int = 1) -> Identity:
    generator = torch.Generator().manual_seed(seed)
    hidden = tuple(torch.randn(1, photos * 10, 8, generator=generator) for _ in range(5))
    return Identity(torch.randn(1, photos, 12, generator=generator), hidden, {"glintr100": "abc"})


def fresh(pipe: Any, seed: int = 0, encoder: nn.Module | None = None) -> PuLID:
    """Create an adapter with a visible effect."""
    torch.manual_seed(seed)
    adapter = PuLID.for_unet(
        pipe.unet, encoder or IDEncoder(12, 64, vit_dim=8, hidden_dim=16)
    ).eval()
    for layer in adapter.id_adapter_attn_layers.values():
        nn.init.normal_(layer.id_to_k.weight, std=0.5)
        nn.init.normal_(layer.id_to_v.weight, std=0.5)
    return adapter


def run(
    pipe: Any,
    prompt: Any = "portrait",
    seed: int = 0,
    count: int = 1,
    guidance: float = 1.0,
    **options: Any,
) -> np.ndarray:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    total = len(prompts) * count
    return pipe(
        prompts,
        num_images_per_prompt=count,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed + k) for k in range(total)],
        output_type="latent",
        **options,
    ).images.numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


anna, ben = someone(1), someone(2)
