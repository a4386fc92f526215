"""Small files in the published formats, random identities, and short runs of a tiny pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from openpulid.identity.identity import Identity

WIDTH, CROSS = 6, 64
PROMPTS = ["portrait of a person", "film noir"]


def published(unet: Any, width: int = WIDTH) -> dict[str, dict[str, Tensor]]:
    """Create a small FaceID file for a U-Net and face embeddings of this width."""
    generator, cross = torch.Generator().manual_seed(0), unet.config.cross_attention_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    projection = {"proj.0.weight": random(2 * width, width), "proj.0.bias": random(2 * width)}
    projection |= {"proj.2.weight": random(4 * cross, 2 * width), "proj.2.bias": random(4 * cross)}
    projection |= {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    layers: dict[str, Tensor] = {}
    for index, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        inner, heard = attention.to_q.out_features, attention.to_k.in_features
        for linear, wide in (("q", inner), ("k", heard), ("v", heard), ("out", inner)):
            layers[f"{index}.to_{linear}_lora.down.weight"] = random(2, wide)
            layers[f"{index}.to_{linear}_lora.up.weight"] = random(inner, 2)
        if name.endswith("attn2.processor"):
            layers |= {f"{index}.to_{x}_ip.weight": random(inner, cross) for x in "kv"}
    return {"image_proj": projection, "ip_adapter": layers}


def resampler(unet: Any, tokens: int = 3) -> dict[str, dict[str, Tensor]]:
    """Create a small file in the format of InstantID's adapter, a Resampler."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    inner, heads = 64, 64  # one head of 64, as diffusers reads it from the shapes
    names = {
        "latents": random(1, tokens, inner),
        "proj_in.weight": random(inner, WIDTH),
        "proj_in.bias": random(inner),
    }
    names |= {"proj_out.weight": random(CROSS, inner), "proj_out.bias": random(CROSS)}
    names |= {"norm_out.weight": torch.ones(CROSS), "norm_out.bias": torch.zeros(CROSS)}
    for depth in range(4):  # diffusers builds no other
        layer = f"layers.{depth}"
        for norm in ("0.norm1", "0.norm2", "1.0"):
            names |= {
                f"{layer}.{norm}.weight": torch.ones(inner),
                f"{layer}.{norm}.bias": torch.zeros(inner),
            }
        names |= {
            f"{layer}.0.to_q.weight": random(heads, inner),
            f"{layer}.0.to_kv.weight": random(2 * heads, inner),
        }
        names |= {f"{layer}.0.to_out.weight": random(inner, heads)}
        names |= {
            f"{layer}.1.1.weight": random(4 * inner, inner),
            f"{layer}.1.3.weight": random(inner, 4 * inner),
        }
    layers: dict[str, Tensor] = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            layers |= {
                f"{index}.to_{x}_ip.weight": random(attention.to_q.out_features, CROSS)
                for x in "kv"
            }
    return {"image_proj": names, "ip_adapter": layers}


def controlnet(unet: Any) -> ControlNetModel:
    """Create a ControlNet for a U-Net, with a visible effect."""
    torch.manual_seed(3)
    net = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(16, 32), load_weights_from_unet=False
    )
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)
    return net


def person(seed: int, photos: int = 1) -> Identity:
    generator = torch.Generator().manual_seed(seed)
    marks = 0.2 + 0.6 * torch.rand(1, photos, 5, 2, generator=generator)
    features = 5 * torch.randn(1, photos, WIDTH + 3, generator=generator)
    return Identity(features, (torch.zeros(1, photos, 2),) * 5, landmarks=marks)


def generate(
    pipe: Any, prompts: list[str] = PROMPTS[:1], guidance: float = 3.0, **more: Any
) -> Tensor:
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    options = {
        "num_inference_steps": 2,
        "guidance_scale": guidance,
        "output_type": "latent",
        "generator": generators,
    }
    return pipe(prompts, **options, **more).images
