"""LoRAs of a request: found and checked by their headers, loaded while the request runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openpulid.errors import OptionError, WeightsError
from openpulid.io.checkpoints import explain_bad_weights
from openpulid.io.hub import locate
from openpulid.io.lora_files import check_lora, select_lora_file
from openpulid.io.networks import list_files
from openpulid.pipelines.factory import no_progress_bars
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.request_inputs import Lora


@dataclass(frozen=True)
class LoraInput:
    """The file of a `Lora`.

    Attributes:
        path: of the file.
        scale: of its change.
        base: the base model it was trained for; None if its header does not tell.
    """

    path: Path
    scale: float
    base: str | None

    def check(self, models: ModelSet) -> None:
        """Check that it was trained for the base model, as far as its header tells.

        Raises:
            WeightsError: it was trained for another base model.
        """
        # the layers of FLUX's relatives have FLUX's names
        expected = "FLUX.1" if models.has_transformer else models.base_name
        if self.base is not None and self.base != expected:
            raise WeightsError(
                f"{self.path} is a LoRA for {self.base}, and the base model is {models.base_name}; "
                "use a LoRA for that."
            )


def open_lora(lora: Lora) -> LoraInput:
    """Find the file of a LoRA and read its header. Nothing is downloaded.

    Raises:
        WeightsError: the file is missing, damaged, or no LoRA that diffusers loads.
    """
    path = _find_file(lora.model)
    return LoraInput(path, lora.scale, check_lora(path))


def _find_file(model: str) -> Path:
    path = Path(model)
    folder = path if path.exists() else locate(model)
    if not folder.is_dir():
        return folder
    names = list_files(folder)
    name = select_lora_file(names)
    if name is None:
        files = sorted(name for name in names if name.endswith(".safetensors"))
        found = f"it holds {', '.join(files[:3])}; name the file" if files else "it holds none"
        raise WeightsError(f"{folder} is not the folder of one LoRA: {found}.")
    return folder / name


@contextmanager
def use_loras(pipe: Any, loras: Sequence[LoraInput]) -> Iterator[None]:
    """Load LoRAs into a pipeline while this is open; afterwards it is as it was.

    Args:
        pipe: a pipeline of SDXL or FLUX.
        loras: in the order of the request.

    Raises:
        OptionError: the pipeline has LoRAs of its own.
        WeightsError: a LoRA does not fit the base model.
    """
    if not loras:
        yield
        return
    if own := sorted({name for names in pipe.get_list_adapters().values() for name in names}):
        raise OptionError(
            f"the pipeline has LoRAs of its own ({', '.join(own)}), which those of a request would "
            "replace; call pipe.unload_lora_weights() and name all in the request."
        )
    scales = {f"lora_{number}": lora.scale for number, lora in enumerate(loras)}
    try:
        for name, lora in zip(scales, loras, strict=True):
            _load(pipe, name, lora.path)
        pipe.set_adapters(list(scales), list(scales.values()))
        yield
    finally:
        pipe.unload_lora_weights()


def fuse_lora(pipe: Any, lora: LoraInput) -> None:
    """Add a LoRA to the weights of a pipeline for good.

    Raises:
        WeightsError: it does not fit the base model.
    """
    _load(pipe, "fused", lora.path)
    pipe.fuse_lora(list(pipe.get_list_adapters()), lora_scale=lora.scale)
    pipe.unload_lora_weights()


def _load(pipe: Any, name: str, path: Path) -> None:
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    message = f"{path} does not fit this base model; use a LoRA that was trained for it"
    with no_progress_bars(), explain_bad_weights(message), _hide_float8(network, pipe.vae.dtype):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    if not any(name in names for names in pipe.get_list_adapters().values()):
        raise WeightsError(f"{path} changes no layer of this base model; use a LoRA for it.")


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
