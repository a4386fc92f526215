"""LoRA files: which file of a folder is one, and for which base model it was trained.

The header of a file is enough. Names follow diffusers, peft or kohya's trainer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from openpulid.errors import WeightsError
from openpulid.io.checkpoint_kinds import LORA, Shape, describe_kind, find_kind, read_header
from openpulid.io.networks import CONFIG, select_weights

DEFAULT_NAME = "pytorch_lora_weights.safetensors"
"""The file that diffusers' trainers write."""

TEXT_WIDTHS = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "SDXL",
}
"""Width of the prompt's embeddings, which a U-Net's cross-attention reads -> the base model."""

FLUX_TOKEN = 64
"""Width of a token of FLUX.1; a Control LoRA appends the tokens of an image."""

_FLUX = re.compile(r"(^|[._])(single_(transformer_)?blocks|double_blocks)[._]\d")
_TEXT_KEY = re.compile(r"attn2[._](processor[._])?to_k[._](lora[._])?(lora_)?(down|A)\b")
_FLUX_INPUT = re.compile(r"(x_embedder|img_in)\.lora_(A|down)\.")
_UNSUPPORTED = (
    (re.compile(r"hada_w\d|lokr_w\d"), "a LoHa or LoKr of LyCORIS"),
    (re.compile(r"dora_scale"), "a DoRA of LyCORIS or kohya's trainer"),
)


def select_lora_file(names: Iterable[str]) -> str | None:
    """Select the LoRA among the files of a folder or repository.

    Args:
        names: of the files.

    Returns:
        The name; None if there is none, there are several, or they are a network.
    """
    files = [name for name in names if "/" not in name]
    if CONFIG in files or select_weights(files):
        return None
    weights = [name for name in files if name.endswith(".safetensors")]
    if DEFAULT_NAME in weights:
        return DEFAULT_NAME
    return weights[0] if len(weights) == 1 else None


def check_lora(path: str | os.PathLike[str]) -> str | None:
    """Check by its header that a file is a LoRA that diffusers loads.

    Args:
        path: safetensors, or a PyTorch file.

    Returns:
        The base model it was trained for; None if names and shapes do not tell it.

    Raises:
        WeightsError: the file is missing, damaged, or no LoRA.
    """
    path = Path(path)
    shapes = read_header(path).shapes
    for pattern, kind in _UNSUPPORTED:
        if any(pattern.search(name) for name in shapes):
            raise WeightsError(f"{path} is {kind}, which diffusers does not load; use a LoRA.")
    if find_kind(shapes) is not LORA:
        raise WeightsError(f"{path} is not a LoRA: {describe_kind(shapes)}.")
    return _find_base(shapes)


def _find_base(shapes: Mapping[str, Shape]) -> str | None:
    if any(_FLUX.search(name) for name in shapes):
        return "FLUX.1 Control (Canny or Depth)" if _is_control(shapes) else "FLUX.1"
    widths = {shape[1] for name, shape in shapes.items() if _TEXT_KEY.search(name)}
    if len(widths) == 1:
        return TEXT_WIDTHS.get(widths.pop())
    return _find_base_by_text_encoders(shapes)


def _is_control(shapes: Mapping[str, Shape]) -> bool:
    inputs = [shape for name, shape in shapes.items() if _FLUX_INPUT.search(name)]
    return any(len(shape) == 2 and shape[1] > FLUX_TOKEN for shape in inputs)


def _find_base_by_text_encoders(names: Collection[str]) -> str | None:
    """Return the base of a LoRA that changes no attention to the prompt in the U-Net."""
    if any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in names):
        return "SDXL"
    if any(name.startswith("lora_te_") for name in names):
        return "Stable Diffusion 1"
    return None
