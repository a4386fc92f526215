"""Packs of insightface: ONNX models of face detection and face recognition."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpulid.errors import WeightsError


def to_uint8(image: Tensor) -> np.ndarray:
    """(3, H, W) float in [0, 1] -> (H, W, 3) uint8."""
    return np.ascontiguousarray(
        (image.detach().cpu() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    )


def load_onnx_model(file: str | os.PathLike[str], device: str | torch.device, wanted: str) -> Any:
    """A model of insightface's zoo on the device's provider, the CPU's where that cannot be had.

    Args:
        wanted: the method that such a model has.

    Raises:
        WeightsError: no such file, or another kind of model.
    """
    model = _load_model(file, device)
    if not hasattr(model, wanted):
        raise WeightsError(
            f"{file} is a model of another kind ({type(model).__name__}); take the one that the pack names."
        )
    return model


def find_pack(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The detector's and the recogniser's file in the folder of an insightface pack, whatever they are called; or in the one
    folder within, since antelopev2's archive unpacks so.

    Raises:
        WeightsError: it has not both.
    """
    kinds: dict[str, Path] = {}
    for file in sorted(Path(folder).glob("*.onnx")) or sorted(Path(folder).glob("*/*.onnx")):
        model = _load_model(file, "cpu")
        kinds |= {
            kind: file
            for kind in ("detect", "get_feat")
            if hasattr(model, kind) and kind not in kinds
        }
    if len(kinds) < 2:
        raise WeightsError(
            f"{folder} is no pack of insightface; such a folder has a detector and a recogniser, as .onnx files."
        )
    return kinds["detect"], kinds["get_feat"]


def _load_model(file: str | os.PathLike[str], device: str | torch.device) -> Any:
    import onnxruntime
    from insightface.model_zoo import get_model

    if not Path(file).is_file():
        raise WeightsError(
            f"{file} is not there; `pulid weights get sdxl` says where it comes from."
        )
    onnxruntime.set_default_logger_severity(3)
    try:
        model = get_model(
            os.fspath(file),
            providers=select_providers(device, onnxruntime.get_available_providers()),
        )
    except Exception as error:  # protobuf, onnxruntime and insightface each have their own
        raise WeightsError(
            f"{file} cannot be opened ({str(error).splitlines()[0]}); get it again."
        ) from error
    return model


def select_providers(
    device: str | torch.device, available: Sequence[str]
) -> list[str | tuple[str, dict[str, int]]]:
    """onnxruntime's names for a device of PyTorch's, with its number if it has one; the CPU always last."""
    device = torch.device(device)
    wanted = {
        "cuda": ("CUDAExecutionProvider", "MIGraphXExecutionProvider", "ROCMExecutionProvider"),
        "mps": ("CoreMLExecutionProvider",),
    }
    first = [name for name in wanted.get(device.type, ()) if name in available]
    numbered = [(name, {"device_id": device.index}) if device.index else name for name in first[:1]]
    return [*numbered, "CPUExecutionProvider"]
