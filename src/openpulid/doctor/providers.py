"""The execution providers of ONNX Runtime, which runs the face models of photos."""

from __future__ import annotations

from collections.abc import Collection

import onnxruntime

from openpulid.device import list_devices
from openpulid.doctor.report import Section

CUDA_PROVIDER = "CUDAExecutionProvider"


def check() -> Section:
    """List the providers, and note an NVIDIA GPU that they do not use."""
    providers = onnxruntime.get_available_providers()
    note = describe_unused_gpu([device.type for device in list_devices()], providers)
    rows = tuple((provider,) for provider in providers)
    return Section(("onnxruntime provider",), rows, notes=(note,) if note else ())


def describe_unused_gpu(devices: Collection[str], providers: Collection[str]) -> str:
    """Return a sentence on a GPU that the face models do not use, or "".

    Args:
        devices: types of the devices that PyTorch uses.
        providers: names of the providers of ONNX Runtime.
    """
    if "cuda" not in devices or CUDA_PROVIDER in providers:
        return ""
    return (
        "there is a GPU, but onnxruntime only has the provider of the CPU, so that faces of photos "
        "take seconds; pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu."
    )
