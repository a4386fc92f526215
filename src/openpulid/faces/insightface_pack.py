"""Load models from insightface packs: ONNX files for face detection and face recognition."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpulid.errors import WeightsError, explain_missing_library, first_line, is_out_of_memory

PROVIDERS = {
    "cuda": ("CUDAExecutionProvider", "MIGraphXExecutionProvider", "ROCMExecutionProvider"),
    "mps": ("CoreMLExecutionProvider",),
}
"""onnxruntime's execution providers for each type of PyTorch device, the preferred one first."""


YUNET_OUTPUT = b"obj_32"
"""Name of an output of YuNet's network that no detector of insightface has."""

MAX_YUNET_SIZE = 1 << 20
"""Bytes of YuNet's file, which has 230 kB; other networks need not be read to tell them apart."""


def to_uint8(image: Tensor) -> np.ndarray:
    """Convert an image (3, H, W), float in [0, 1], to (H, W, 3) uint8."""
    values = (image.detach().cpu() * 255).round().clamp(0, 255).byte()
    return np.ascontiguousarray(values.permute(1, 2, 0).numpy())


def load_onnx_model(file: str | os.PathLike[str], device: str | torch.device, method: str) -> Any:
    """Load a model of the insightface model zoo.

    Args:
        file: the ONNX file.
        device: where to run it; the CPU is used if onnxruntime does not support the device.
        method: a method that the model must have, "detect" or "get_feat".

    Raises:
        WeightsError: the file is missing, cannot be read, or is a model of another kind.
    """
    model = _load_model(file, device)
    if not hasattr(model, method):
        raise WeightsError(
            f"{file} is a model of another kind ({type(model).__name__}); "
            "use the file that the pack names."
        )
    return model


def find_pack(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Find the files of the detector and the face recognition model of an insightface pack.

    The file names do not matter, and the detector may be OpenCV's YuNet. The models may also be in
    a subfolder, since the archive of antelopev2 unpacks that way.

    Raises:
        WeightsError: one of the two models is missing.
    """
    files: dict[str, Path] = {}
    for file in sorted(Path(folder).glob("*.onnx")) or sorted(Path(folder).glob("*/*.onnx")):
        if is_yunet(file):
            files.setdefault("detect", file)
            continue
        model = _load_model(file, "cpu")
        for method in ("detect", "get_feat"):
            if hasattr(model, method):
                files.setdefault(method, file)
    if len(files) < 2:
        raise WeightsError(
            f"{folder} is no insightface pack; "
            "it needs a face detector and a face recognition model as .onnx files."
        )
    return files["detect"], files["get_feat"]


def is_yunet(file: str | os.PathLike[str]) -> bool:
    """Return whether a file is YuNet's ONNX file; insightface would open it as its own detector."""
    path = Path(file)
    if not path.is_file() or path.stat().st_size > MAX_YUNET_SIZE:
        return False
    return YUNET_OUTPUT in path.read_bytes()


def select_providers(
    device: str | torch.device, available: Sequence[str]
) -> list[str | tuple[str, dict[str, int]]]:
    """Select onnxruntime's execution providers for a PyTorch device; the CPU is always the last.

    Args:
        device: the device; its index is passed on if it is not 0.
        available: the providers of the installed onnxruntime.
    """
    device = torch.device(device)
    selected: list[str | tuple[str, dict[str, int]]] = []
    for name in PROVIDERS.get(device.type, ()):
        if name in available:
            selected.append((name, {"device_id": device.index}) if device.index else name)
            break
    return [*selected, "CPUExecutionProvider"]


def _load_model(file: str | os.PathLike[str], device: str | torch.device) -> Any:
    with explain_missing_library():
        import onnxruntime
        from insightface.model_zoo import get_model

    if not Path(file).is_file():
        raise WeightsError(f"{file} does not exist; `pulid weights get sdxl` downloads it.")
    onnxruntime.set_default_logger_severity(3)
    providers = select_providers(device, onnxruntime.get_available_providers())
    try:
        return get_model(os.fspath(file), providers=providers)
    # protobuf, onnxruntime and insightface have unrelated exception classes.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise WeightsError(f"{file} cannot be opened ({reason}); download it again.") from error
