"""Untrained tensors, LoRAs and files of the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.io.checkpoints import save_tensors

RANK = 8  # of the LoRAs
HEAD_WIDTH = 64  # of a Resampler's attention heads, the only width that diffusers builds


def random(*shape: int) -> Tensor:
    """Draw an untrained weight, scaled by its fan-in."""
    return torch.randn(shape) / shape[-1] ** 0.5


def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
    """Create the untrained tensors of a linear layer."""
    return {f"{name}.weight": random(out, into), f"{name}.bias": torch.zeros(out)}


def norm(name: str, width: int) -> dict[str, Tensor]:
    """Create the tensors of a layer norm."""
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def resampler(face: int, tokens: int, out: int) -> dict[str, Tensor]:
    """Create the untrained tensors of a Resampler of four layers, by their published names.

    Args:
        face: width of the face embedding.
        tokens: number of tokens.
        out: width of the tokens.
    """
    names = {"latents": random(1, tokens, HEAD_WIDTH), **linear("proj_in", HEAD_WIDTH, face)}
    names |= linear("proj_out", out, HEAD_WIDTH) | norm("norm_out", out)
    for depth in range(4):
        layer = f"layers.{depth}"
        names |= (
            norm(f"{layer}.0.norm1", HEAD_WIDTH)
            | norm(f"{layer}.0.norm2", HEAD_WIDTH)
            | norm(f"{layer}.1.0", HEAD_WIDTH)
        )
        names |= {
            f"{layer}.0.to_q.weight": random(HEAD_WIDTH, HEAD_WIDTH),
            f"{layer}.0.to_kv.weight": random(2 * HEAD_WIDTH, HEAD_WIDTH),
            f"{layer}.0.to_out.weight": random(HEAD_WIDTH, HEAD_WIDTH),
            f"{layer}.1.1.weight": random(4 * HEAD_WIDTH, HEAD_WIDTH),
            f"{layer}.1.3.weight": random(HEAD_WIDTH, 4 * HEAD_WIDTH),
        }
    return names


def create_lora(unet: Any) -> dict[str, Tensor]:
    """Create an untrained LoRA of all attention layers, by peft's names after `unet`."""
    lora: dict[str, Tensor] = {}
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        attention = unet.get_submodule(layer)
        for q in ("to_q", "to_k", "to_v", "to_out.0"):
            module = attention.get_submodule(q)
            lora[f"unet.{layer}.{q}.lora_A.weight"] = random(RANK, module.in_features)
            lora[f"unet.{layer}.{q}.lora_B.weight"] = torch.zeros(module.out_features, RANK)
    return lora


def train_lora(method: Any) -> nn.ParameterList:
    """Make the matrices in `method.lora` trainable, and return them."""
    method.lora = {
        name: (nn.Parameter(down), nn.Parameter(up)) for name, (down, up) in method.lora.items()
    }
    return nn.ParameterList([x for pair in method.lora.values() for x in pair])


def lora_tensors(method: Any) -> dict[str, Tensor]:
    """Return the matrices in `method.lora` by the names of `create_lora`."""
    lora: dict[str, Tensor] = {}
    for name, (down, up) in method.lora.items():
        lora |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return lora


def save_half(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    in_8_bits: bool = False,
) -> Path:
    """Save tensors in half precision, and return the file; its suffix is added to `path`.

    Args:
        tensors: by name.
        path: the file without its suffix.
        metadata: stored with the tensors.
        in_8_bits: store matrices in float8, which halves the size.
    """
    file = path.with_suffix(".safetensors")
    half = {
        name: x.detach().to(_storage_dtype(x, in_8_bits)).cpu().contiguous()
        for name, x in tensors.items()
    }
    return save_tensors(half, file, dict(metadata or {}))


def _storage_dtype(tensor: Tensor, in_8_bits: bool) -> torch.dtype:
    return torch.float8_e4m3fn if in_8_bits and tensor.dim() > 1 else torch.float16
