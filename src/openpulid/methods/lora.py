"""Changes of linear layers as forward hooks: low-rank matrices, or whole ones.

Hooks instead of a LoRA of the pipeline: loading one there would deactivate the user's own LoRA, and
unloading would leave its layers behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from openpulid.errors import WeightsError
from openpulid.io.checkpoints import explain_bad_weights

LoraMatrices = dict[str, tuple[Tensor, Tensor]]
"""Name of a linear layer -> down (rank, in) and up (out, rank)."""


def low_rank_hook(down: Tensor, up: Tensor, is_active: Callable[[], bool] = lambda: True) -> Any:
    """Create a forward hook that adds up(down(x)) to the output of a linear layer.

    Args:
        down: (rank, in).
        up: (out, rank).
        is_active: read in each call.
    """

    def add_low_rank(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not is_active():
            return None
        x: Tensor = args[0]
        return output + linear(linear(x, down.to(x)), up.to(x))

    return add_low_rank


def delta_hook(delta: Tensor, is_active: Callable[[], bool]) -> Any:
    """Create a forward hook that adds delta x to the output of a linear layer.

    Args:
        delta: (out, in).
        is_active: read in each call.
    """

    def add_delta(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return output + linear(args[0], delta.to(args[0])) if is_active() else None

    return add_delta


def shift_hook(delta: Tensor, is_active: Callable[[], bool]) -> Any:
    """Create a forward hook that adds delta (out,) to the output of a layer.

    Args:
        delta: the difference of a bias.
        is_active: read in each call.
    """

    def add_delta(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return output + delta.to(output) if is_active() else None

    return add_delta


def move_lora(lora: LoraMatrices, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move low-rank matrices to a device and dtype, in place and one layer at a time."""
    for name, (down, up) in lora.items():
        lora[name] = (down.to(device, dtype), up.to(device, dtype))


def check_lora(unet: nn.Module, lora: LoraMatrices) -> None:
    """Check that all low-rank matrices fit the layers of a U-Net.

    Raises:
        WeightsError: a layer is missing, or matrices have other shapes.
    """
    for name, (down, up) in lora.items():
        with explain_bad_weights("this adapter was trained for another base model"):
            layer = unet.get_submodule(name)
        check_low_rank(layer, down, up)


def check_low_rank(layer: Any, down: Tensor, up: Tensor) -> None:
    """Check that low-rank matrices fit a linear layer.

    Args:
        layer: a linear layer of the network.
        down: (rank, in).
        up: (out, rank).

    Raises:
        WeightsError: they have other shapes.
    """
    expected = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
    if down.ndim == 4:
        raise WeightsError(
            "this LoRA changes convolutions, which this method does not support; load it as a LoRA "
            "of the pipeline instead."
        )
    is_matrix = down.ndim == up.ndim == 2 and down.shape[:1] == up.shape[1:]
    if not is_matrix or (up.shape[0], down.shape[1]) != expected:
        raise WeightsError(
            "the LoRA of this adapter does not fit this base model; "
            "use the adapter for this base model, or download its file again."
        )


def find_lora_layers(
    unet: Any, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Find the linear layers of a U-Net that an IP-Adapter file changes.

    Args:
        unet: a U-Net.
        tensors: by names such as "3.to_q_lora.down.weight"; the number is the index among all
            attention processors.

    Yields:
        The layer and its matrices, down (rank, in) and up (out, rank).

    Raises:
        WeightsError: a layer has only one matrix.
    """
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    for name, down in tensors.items():
        index, layer, side, _ = name.split(".")
        if f"{index}.{layer}.down.weight" not in tensors:
            raise WeightsError(f"the LoRA of this adapter lacks a matrix for {index}.{layer}.")
        if side != "down":
            continue
        attention = unet.get_submodule(names[int(index)])
        attribute = layer.removesuffix("_lora")
        module = attention.to_out[0] if attribute == "to_out" else getattr(attention, attribute)
        yield module, down, tensors[f"{index}.{layer}.up.weight"]


def parse_lora(tensors: Mapping[str, Tensor], is_text_encoder: bool = False) -> LoraMatrices:
    """Group the tensors of a LoRA file by layer.

    Args:
        tensors: by any of the names that diffusers and peft use.
        is_text_encoder: whether they change a text encoder, not a U-Net.

    Returns:
        Name of the layer -> down (rank, in) and up (out, rank).

    Raises:
        WeightsError: The file uses other names.
    """
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    converted = dict(tensors)
    if not is_text_encoder:
        converted = convert_unet_state_dict_to_peft(converted)
    elif not all(".lora_A." in name or ".lora_B." in name for name in converted):
        # diffusers recognizes its old names only if all four matrices of a layer have a LoRA
        is_old = any("_lora." in name for name in converted)
        converted = convert_state_dict_to_peft(
            converted, StateDictType.DIFFUSERS_OLD if is_old else None
        )
    down = {name.split(".lora_A")[0]: x for name, x in converted.items() if ".lora_A" in name}
    up = {name.split(".lora_B")[0]: x for name, x in converted.items() if ".lora_B" in name}
    if set(down) != set(up) or len(down) + len(up) != len(converted):
        raise WeightsError(
            "the LoRA in this file does not use diffusers' names; download the published file."
        )
    pairs = {}
    for name, matrix in down.items():
        layer = name.removeprefix("unet.").replace(".processor", "")
        pairs[layer] = (matrix, up[name])
    return pairs
