"""Training an IP-Adapter method: its trainable layers, and its file in the published format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from openpulid.io.checkpoints import save_tensors
from openpulid.methods.ip_adapter.base import IPAdapterBase
from openpulid.methods.ip_adapter.resampler import published_name

# diffusers' names -> the published names
PUBLISHED_NAMES = {
    "image_embeds.": "proj.",
    "ff.net.0.proj.": "proj.0.",
    "ff.net.2.": "proj.2.",
}


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
    if not hasattr(layer, "latents"):
        return {_published_name(name): tensor for name, tensor in state.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.to_v." in name:
            continue
        if ".attn.to_k." in name:  # published files have keys and values in one matrix
            tensor = torch.cat([tensor, state[name.replace("to_k", "to_v")]])
        renamed[published_name(name)] = tensor
    return renamed


def _published_name(name: str) -> str:
    for diffusers_name, published in PUBLISHED_NAMES.items():
        name = name.replace(diffusers_name, published)
    return name
