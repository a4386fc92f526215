"""Small picture towers and people as they see them, for the methods that read CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.faces.face import Face
from openpulid.identity.clip_extractor import ClipExtractor
from tests.support.token_files import CROSS, WIDTH

SEEN = 64  # width of the tower, and of its embedding
FACE = Face(
    torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(5)),
    torch.tensor([4.0, 4.0, 16.0, 20.0]),
    torch.tensor([[7.0, 9.0], [13.0, 9.0], [10.0, 13.0], [8.0, 16.0], [12.0, 16.0]]),
    0.9,
)


class Faces:
    """Knows one face, wherever it is asked."""

    search_description = "one look"

    def detect(self, image: Tensor) -> list[Face]:
        return [FACE]


def config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=SEEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
        image_size=8, patch_size=4, projection_dim=SEEN,
    )  # fmt: skip


def tower() -> Any:
    torch.manual_seed(2)
    return CLIPVisionModelWithProjection(config()).eval()


def embedding(face: Face) -> Tensor:
    """(1, WIDTH), a raw face embedding."""
    return 5 * torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(9))


def features(**options: Any) -> ClipExtractor:
    return ClipExtractor(Faces(), tower(), models={"tower": "a"}, **options)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def layers(unet: Any) -> dict[str, Tensor]:
    """Keys and values of every cross-attention."""
    found: dict[str, Tensor] = {}
    for place, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            found |= {f"{place}.to_{x}_ip.weight": random(inner, CROSS, seed=place) for x in "kv"}
    return found


def plain(unet: Any) -> dict[str, dict[str, Tensor]]:
    """ip-adapter_sdxl.safetensors, small."""
    projection = {"proj.weight": random(4 * CROSS, SEEN), "proj.bias": random(4 * CROSS)}
    projection |= {"norm.weight": torch.ones(CROSS), "norm.bias": torch.zeros(CROSS)}
    return {"image_proj": projection, "ip_adapter": layers(unet)}


def perceiver(prefix: str = "") -> dict[str, Tensor]:
    """The layers of a Resampler, or of FaceID-PlusV2's perceiver."""
    named = {"proj_in.weight": random(SEEN, SEEN), "proj_in.bias": random(SEEN)}
    named |= {"proj_out.weight": random(CROSS, SEEN), "proj_out.bias": random(CROSS)}
    named |= {"norm_out.weight": torch.ones(CROSS), "norm_out.bias": torch.zeros(CROSS)}
    for depth in range(4):  # diffusers builds no other
        layer = f"layers.{depth}"
        for norm in ("0.norm1", "0.norm2", "1.0"):
            named |= {
                f"{layer}.{norm}.weight": torch.ones(SEEN),
                f"{layer}.{norm}.bias": torch.zeros(SEEN),
            }
        named |= {
            f"{layer}.0.to_q.weight": random(64, SEEN),
            f"{layer}.0.to_kv.weight": random(128, SEEN),
        }
        named |= {f"{layer}.0.to_out.weight": random(SEEN, 64)}
        named |= {
            f"{layer}.1.1.weight": random(4 * SEEN, SEEN),
            f"{layer}.1.3.weight": random(SEEN, 4 * SEEN),
        }
    return {prefix + name: tensor for name, tensor in named.items()}


def plus(unet: Any, tokens: int = 3) -> dict[str, dict[str, Tensor]]:
    """ip-adapter-plus_sdxl_vit-h.safetensors, small."""
    return {
        "image_proj": {"latents": random(1, tokens, SEEN), **perceiver()},
        "ip_adapter": layers(unet),
    }


def faceid_plus(unet: Any) -> dict[str, dict[str, Tensor]]:
    """ip-adapter-faceid-plusv2_sdxl.bin, small."""
    projection = {"proj.0.weight": random(2 * WIDTH, WIDTH), "proj.0.bias": random(2 * WIDTH)}
    projection |= {"proj.2.weight": random(4 * SEEN, 2 * WIDTH), "proj.2.bias": random(4 * SEEN)}
    projection |= {"norm.weight": torch.ones(SEEN), "norm.bias": torch.zeros(SEEN)}
    known = layers(unet)
    for place, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        inner, cross = attention.to_q.out_features, attention.to_k.in_features
        for linear, wide in (("q", inner), ("k", cross), ("v", cross), ("out", inner)):
            known[f"{place}.to_{linear}_lora.down.weight"] = random(2, wide)
            known[f"{place}.to_{linear}_lora.up.weight"] = random(inner, 2)
    return {"image_proj": projection | perceiver("perceiver_resampler."), "ip_adapter": known}
