"""Load the file of a LoRA into a pipeline, or merge it with the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openpulid.errors import WeightsError
from openpulid.io.checkpoints import explain_bad_weights
from openpulid.pipelines.memory_levels import find_network


def load_lora(pipe: Any, name: str, path: Path) -> None:
    """Load a LoRA under a name.

    Raises:
        WeightsError: it does not fit the base model.
    """
    network = find_network(pipe)
    message = f"{path} does not fit this base model; use a LoRA that was trained for it"
    with explain_bad_weights(message), _hide_float8(network, pipe.vae.dtype):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    if not any(name in names for names in pipe.get_list_adapters().values()):
        raise WeightsError(f"{path} changes no layer of this base model; use a LoRA for it.")


def fuse_lora(pipe: Any, path: Path, scale: float = 1.0) -> None:
    """Add a LoRA to the weights of a pipeline for good.

    Raises:
        WeightsError: it does not fit the base model.
    """
    load_lora(pipe, "fused", path)
    pipe.fuse_lora(list(pipe.get_list_adapters()), lora_scale=scale)
    pipe.unload_lora_weights()


@contextmanager
def _hide_float8(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Show peft weights of a dtype that computes, in place of those that are stored in 8 bits.

    peft gives the layers of a LoRA the dtype of the layer that they change.

    Args:
        network: with weights in float8, see `memory_levels.store_in_fp8`.
        dtype: in which the network computes.
    """
    layers = [x for x in network.modules() if isinstance(x, (nn.Linear, nn.Conv2d))]
    stored = [
        (x, x.weight) for x in layers if x.weight.is_floating_point() and x.weight.itemsize == 1
    ]
    try:
        for layer, weight in stored:
            # one number that looks like a matrix
            number = torch.empty(1, dtype=dtype, device=weight.device)
            layer.weight = nn.Parameter(number.expand(weight.shape), requires_grad=False)
        yield
    finally:
        for layer, weight in stored:
            layer.weight = weight
