"""Training an IP-Adapter method: its trainable layers, and its file in the published format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from openpulid.io.checkpoints import save_tensors
from openpulid.methods.ip_adapter.base import IPAdapterBase

# diffusers' names -> the published names
RESAMPLER_NAMES = {
    ".ln0.": ".0.norm1.",
    ".ln1.": ".0.norm2.",
    ".attn.to_q.": ".0.to_q.",
    ".attn.to_out.0.": ".0.to_out.",
    ".ff.0.": ".1.0.",
    ".ff.1.net.0.proj.": ".1.1.",
    ".ff.1.net.2.": ".1.3.",
}
MLP_NAMES = {"ff.net.0.proj.": "proj.0.", "ff.net.2.": "proj.2."}


def trainable_layers(method: IPAdapterBase, pipe: Any) -> nn.Module:
    """Collect everything of a method that is trained, with gradients enabled.

    These are the projection, keys and values, and the LoRA.
    """
    layers = method.layers_for(pipe)
    method.lora = {name: nn.Parameter(x.clone()) for name, x in method.lora.items()}
    processors = [module for module in layers.processors.values() if isinstance(module, nn.Module)]
    lora = nn.ParameterList(list(method.lora.values()))
    return nn.ModuleList([layers.projection, *processors, lora]).requires_grad_(True)


def export_adapter(method: IPAdapterBase, pipe: Any, path: Path) -> Path:
    """Write the trained layers under their published names, in half precision.

    Returns:
        The path.
    """
    layers = method.layers_for(pipe)
    (projection,) = cast(nn.ModuleList, layers.projection.image_projection_layers)
    tensors = {f"image_proj.{name}": x for name, x in projection_state(projection).items()}
    for index, processor in enumerate(layers.processors.values()):
        if isinstance(processor, nn.Module):
            for kind in ("k", "v"):
                (linear,) = getattr(processor, f"to_{kind}_ip")
                tensors[f"ip_adapter.{index}.to_{kind}_ip.weight"] = linear.weight
    for name, matrix in method.lora.items():
        tensors[f"ip_adapter.{name}"] = matrix
    return save_tensors(
        {name: x.detach().half().cpu().contiguous() for name, x in tensors.items()}, path
    )


def projection_state(layer: nn.Module) -> dict[str, Tensor]:
    """Return the state of one of diffusers' projection layers under the published names."""
    state = layer.state_dict()
    renamed: dict[str, Tensor] = {}
    names = RESAMPLER_NAMES if hasattr(layer, "latents") else MLP_NAMES
    for name, tensor in state.items():
        if ".attn.to_v." in name:
            continue
        if ".attn.to_k." in name:  # published files have keys and values in one matrix
            tensor = torch.cat([tensor, state[name.replace("to_k", "to_v")]])
            name = name.replace(".attn.to_k.", ".0.to_kv.")
        for diffusers_name, published_name in names.items():
            name = name.replace(diffusers_name, published_name)
        renamed[name] = tensor
    return renamed
