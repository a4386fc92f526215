"""LoRAs of a request: found and checked by their headers, loaded while the request runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError, WeightsError
from openpulid.io.hub import locate
from openpulid.io.lora_files import check_lora, select_lora_file
from openpulid.io.networks import list_files
from openpulid.pipelines.factory import no_progress_bars
from openpulid.pipelines.lora_loading import load_lora
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
            with no_progress_bars():
                load_lora(pipe, name, lora.path)
        pipe.set_adapters(list(scales), list(scales.values()))
        yield
    finally:
        pipe.unload_lora_weights()
