"""The devices of this machine: their memory, and the dtypes that they compute well."""

from __future__ import annotations

from pathlib import Path

import torch

from openpulid.device import (
    FLOAT16_DEVICES,
    compute_dtype,
    hardware_name,
    list_devices,
    memory_size,
    supports_bf16,
)
from openpulid.doctor.report import Section

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def check() -> Section:
    """List the devices, and report a GPU that PyTorch does not use."""
    rows = tuple(describe_device(device) for device in list_devices())
    problem = find_driver_problem(
        NVIDIA_DRIVER.exists(), torch.version.cuda, torch.cuda.is_available()
    )
    columns = ("device", "name", "memory", "fast dtypes", "SDXL in")
    return Section(columns, rows, (problem,) if problem else ())


def describe_device(device: torch.device) -> tuple[str, ...]:
    """Return the row of a device."""
    size = memory_size(device)
    memory = "unknown" if size is None else f"{size / 2**30:.1f} GiB"
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in list_fast_dtypes(device))
    used = str(compute_dtype(device)).removeprefix("torch.")
    return str(device), hardware_name(device), memory, dtypes, used


def list_fast_dtypes(device: torch.device) -> list[torch.dtype]:
    """Return the dtypes that a device computes natively."""
    dtypes = [torch.float32]
    if device.type in FLOAT16_DEVICES:
        dtypes.append(torch.float16)
    if supports_bf16(device):
        dtypes.append(torch.bfloat16)
    return dtypes


def find_driver_problem(has_driver: bool, cuda: str | None, is_available: bool) -> str:
    """Return a sentence on an NVIDIA GPU that PyTorch does not use, or "".

    Args:
        has_driver: whether NVIDIA's driver is loaded.
        cuda: the CUDA version that PyTorch was built for, if any.
        is_available: whether PyTorch finds a GPU.
    """
    if not has_driver or is_available:
        return ""
    if cuda is None:
        return (
            "there is an NVIDIA GPU, but this PyTorch was built without CUDA; install PyTorch for "
            "CUDA as https://pytorch.org/get-started says."
        )
    return (
        f"there is an NVIDIA GPU, but PyTorch for CUDA {cuda} cannot use it; update the driver, "
        "and check the environment variable CUDA_VISIBLE_DEVICES."
    )
