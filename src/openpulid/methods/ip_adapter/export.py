"""Training a token method: the layers that diffusers builds from its file, and the file again from the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from openpulid.methods.ip_adapter.base import IPAdapterBase

RESAMPLER = {
    ".ln0.": ".0.norm1.",
    ".ln1.": ".0.norm2.",
    ".attn.to_q.": ".0.to_q.",
    ".attn.to_out.0.": ".0.to_out.",
    ".ff.0.": ".1.0.",
    ".ff.1.net.0.proj.": ".1.1.",
    ".ff.1.net.2.": ".1.3.",
}
MLP = {"ff.net.0.proj.": "proj.0.", "ff.net.2.": "proj.2."}
"""diffusers' names -> the published ones."""


def trained_layers(method: IPAdapterBase, pipe: Any) -> nn.Module:
    """Projection, keys and values, and the LoRA: everything of the method that trains, with gradients on."""
    processors, projection = method.built(pipe)
    method.lora = {name: nn.Parameter(x.clone()) for name, x in method.lora.items()}
    joined = [processor for processor in processors.values() if isinstance(processor, nn.Module)]
    return nn.ModuleList(
        [projection, *joined, nn.ParameterList(list(method.lora.values()))]
    ).requires_grad_(True)


def published_parts(method: IPAdapterBase, pipe: Any, path: Path) -> Path:
    """Writes what was learned under the published names, in half precision; returns the path."""
    processors, projection = method.built(pipe)
    (layer,) = cast(nn.ModuleList, projection.image_projection_layers)
    flat = {f"image_proj.{name}": x for name, x in published_projection(layer).items()}
    for place, processor in enumerate(processors.values()):
        if isinstance(processor, nn.Module):
            for kind in ("k", "v"):
                flat[f"ip_adapter.{place}.to_{kind}_ip.weight"] = getattr(
                    processor, f"to_{kind}_ip"
                )[0].weight
    flat |= {f"ip_adapter.{name}": x for name, x in method.lora.items()}
    save_file({name: x.detach().half().cpu().contiguous() for name, x in flat.items()}, path)
    return path


def published_projection(layer: nn.Module) -> dict[str, Tensor]:
    """The entries of one of diffusers' projection layers as IP-Adapter's files name them."""
    found: dict[str, Tensor] = {}
    names = RESAMPLER if hasattr(layer, "latents") else MLP
    for name, tensor in layer.state_dict().items():
        if ".attn.to_v." in name:
            continue
        if ".attn.to_k." in name:
            tensor = torch.cat([tensor, layer.state_dict()[name.replace("to_k", "to_v")]])
            name = name.replace(".attn.to_k.", ".0.to_kv.")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found
