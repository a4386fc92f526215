"""Small CLIP vision encoders and identities for the methods that read CLIP features."""

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
    """A face detector that returns the same face for every image."""

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
    """Return a raw face embedding (1, WIDTH)."""
    return 5 * torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(9))


def features(**options: Any) -> ClipExtractor:
    return ClipExtractor(Faces(), tower(), models={"tower": "a"}, **options)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def layers(unet: Any) -> dict[str, Tensor]:
    """Create keys and values for every cross-attention."""
    result: dict[str, Tensor] = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            result |= {f"{index}.to_{x}_ip.weight": random(inner, CROSS, seed=index) for x in "kv"}
    return result


def plain(unet: Any) -> dict[str, dict[str, Tensor]]:
    """Create a small ip-adapter_sdxl.safetensors."""
    projection = {"proj.weight": random(4 * CROSS, SEEN), "proj.bias": random(4 * CROSS)}
    projection |= {"norm.weight": torch.ones(CROSS), "norm.bias": torch.zeros(CROSS)}
    return {"image_proj": projection, "ip_adapter": layers(unet)}


def perceiver(prefix: str = "") -> dict[str, Tensor]:
    """Create the layers of a Resampler, or of FaceID-PlusV2's perceiver."""
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
    """Create a small ip-adapter-plus_sdxl_vit-h.safetensors."""
    return {
        "image_proj": {"latents": random(1, tokens, SEEN), **perceiver()},
        "ip_adapter": layers(unet),
    }


def faceid_plus(unet: Any) -> dict[str, dict[str, Tensor]]:
    """Create a small ip-adapter-faceid-plusv2_sdxl.bin."""
    projection = {"proj.0.weight": random(2 * WIDTH, WIDTH), "proj.0.bias": random(2 * WIDTH)}
    projection |= {"proj.2.weight": random(4 * SEEN, 2 * WIDTH), "proj.2.bias": random(4 * SEEN)}
    projection |= {"norm.weight": torch.ones(SEEN), "norm.bias": torch.zeros(SEEN)}
    defaults = layers(unet)
    for index, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        inner, cross = attention.to_q.out_features, attention.to_k.in_features
        for linear, wide in (("q", inner), ("k", cross), ("v", cross), ("out", inner)):
            defaults[f"{index}.to_{linear}_lora.down.weight"] = random(2, wide)
            defaults[f"{index}.to_{linear}_lora.up.weight"] = random(inner, 2)
    return {"image_proj": projection | perceiver("perceiver_resampler."), "ip_adapter": defaults}
