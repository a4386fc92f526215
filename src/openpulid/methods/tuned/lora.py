"""A LoRA (arXiv 2106.09685) as a method: tuned on one person, or any other LoRA file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor

from openpulid.errors import WeightsError
from openpulid.io.checkpoint_kinds import LORA, CheckpointKind
from openpulid.io.checkpoints import explain_bad_weights, read_optional_metadata
from openpulid.io.lora_files import check_lora
from openpulid.methods.adapter import check_projections_are_called
from openpulid.methods.hooks import PipelineState
from openpulid.methods.lora import (
    LoraMatrices,
    check_low_rank,
    low_rank_hook,
    move_lora,
    parse_lora,
)
from openpulid.methods.tuned.base import ActiveCall, TunedAdapter
from openpulid.methods.tuned.words import Trigger

SDXL_BLOCKS = SimpleNamespace(layers_per_block=2)
"""What diffusers reads of SDXL's configuration to convert kohya's names of blocks."""

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Networks of a pipeline that a LoRA can change."""


class TunedLora(TunedAdapter):
    """W x + scale * up(down(x)) in linear layers of the U-Net and of the text encoders.

    Hooks instead of a LoRA of the pipeline, see `methods.lora`.

    Args:
        layers: name of the network -> its layers, by the names of diffusers.
        trigger: the word for the person; None if the file names none.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (LORA,)

    def __init__(self, layers: Mapping[str, LoraMatrices], trigger: Trigger | None = None) -> None:
        super().__init__(trigger)
        self.layers = {part: dict(layers.get(part, {})) for part in PARTS}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TunedLora:
        """Load a LoRA with the names of diffusers, peft or kohya's trainer.

        Raises:
            WeightsError: the file is missing, damaged, or no LoRA for SDXL.
        """
        cls.check_file(path)
        path = Path(path)
        check_lora(path)
        message = f"{path} is no LoRA for SDXL; use one that was trained for it"
        with explain_bad_weights(message):
            state, alphas, config = StableDiffusionXLPipeline.lora_state_dict(
                str(path.parent),
                weight_name=path.name,
                unet_config=SDXL_BLOCKS,
                return_lora_metadata=True,
            )
        layers = {}
        for part in PARTS:
            prefix = f"{part}."
            tensors = {
                name.removeprefix(prefix): tensor.float()
                * _factor(name, tensor, alphas or {}, config or {})
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
            with explain_bad_weights(message):
                layers[part] = parse_lora(tensors, is_text_encoder=part != "unet")
        if not any(layers.values()):
            raise WeightsError(f"{message}.")
        return cls(layers, Trigger.from_metadata(read_optional_metadata(path)))

    def save(self, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> None:
        """Write the LoRA in float16 with the names of kohya's trainer.

        diffusers, ComfyUI and AUTOMATIC1111 open such files.
        """
        state = {}
        for part, layers in self.layers.items():
            for name, (down, up) in layers.items():
                layer = f"{part}.{_published_name(part, name)}"
                state[f"{layer}.lora_A.weight"] = down
                state[f"{layer}.lora_B.weight"] = up
        self._write(path, "lora", convert_state_dict_to_kohya(state), torch.float16, metadata)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TunedLora:
        """Move the matrices to a device and dtype."""
        for layers in self.layers.values():
            move_lora(layers, device, dtype)
        return self

    def check(self, target: Any) -> None:
        """Raise an error if the LoRA does not fit a pipeline, or a U-Net alone.

        Raises:
            OptionError: the target has no U-Net.
            WeightsError: the LoRA was trained for another base model.
        """
        super().check(target)
        for part, layers in self.layers.items():
            for name, (down, up) in layers.items():
                check_low_rank(_find_layer(PipelineState(target), part, name), down, up)

    def open_hooks(
        self, state: PipelineState, scale: float, call: ActiveCall, stack: ExitStack
    ) -> None:
        """Register the low-rank hooks of all networks."""
        check_projections_are_called(state.network)
        for part, layers in self.layers.items():
            for name, (down, up) in layers.items():
                # the prompt is encoded before the first step
                is_active = call if part == "unet" else None
                hook = low_rank_hook(down, scale * up, is_active or (lambda: True))
                layer = _find_layer(state, part, name)
                stack.callback(layer.register_forward_hook(hook).remove)


def _factor(
    name: str, tensor: Tensor, alphas: Mapping[str, float], config: Mapping[str, Any]
) -> float:
    """Return alpha over the rank for a matrix `down`, and 1 for any other or without an alpha.

    Args:
        name: in the names of diffusers.
        tensor: the matrix.
        alphas: of the file, by the name of the layer (U-Net) or of the matrix (text encoders).
        config: peft's configuration from the metadata of the file, such as "unet.lora_alpha".
    """
    from peft.utils.other import get_pattern_key

    if ".down." not in name and ".lora_A." not in name:
        return 1.0
    rank = float(len(tensor))
    layer = name.split(".lora")[0]
    part, _, module = layer.partition(".")
    alpha = alphas.get(f"{layer}.alpha", alphas.get(f"{name}.alpha"))
    if alpha is None and (alpha := config.get(f"{part}.lora_alpha")) is not None:
        pattern = config.get(f"{part}.alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(pattern, module), alpha)
        rank = rank**0.5 if config.get(f"{part}.use_rslora") else rank
    return 1.0 if alpha is None else float(alpha) / rank


def _find_layer(state: PipelineState, part: str, name: str) -> Any:
    """Return a linear layer of a pipeline's U-Net or text encoder.

    Raises:
        WeightsError: there is none of this name.
    """
    network = state.network if part == "unet" else getattr(state.target, part, None)
    with explain_bad_weights("this LoRA was trained for another base model"):
        assert network is not None, f"there is no {part}"
        if part != "unet" and not hasattr(network, "text_model"):
            name = name.removeprefix("text_model.")
        return network.get_submodule(name)


def _published_name(part: str, name: str) -> str:
    """Return the name of a layer in files; all text encoders have the level `text_model` there."""
    if part == "unet" or name.startswith("text_model."):
        return name
    return f"text_model.{name}"
