"""Device, dtype and memory queries."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from openpulid.errors import OptionError

FLOAT16_DEVICES = ("cuda", "mps", "xpu")
"""Types of devices with fast float16."""


def select_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device of this name; `best_device` by default.

    Raises:
        OptionError: there is no such device on this machine.
    """
    if name is None or name == "":
        return best_device()
    accelerators = list_devices()[1:]
    # and "meta", which computes nothing
    available = ["cpu", *(device.type for device in accelerators[:1]), *map(str, accelerators)]
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):  # not a name of PyTorch
        device = None
    if device is None or str(device) not in [*available, "cpu:0", "meta"]:
        raise OptionError(
            f"there is no device {str(name)!r} on this machine; available: {', '.join(available)}."
        )
    return device


def list_devices() -> list[torch.device]:
    """Return the CPU, and the accelerators of this machine."""
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        count = torch.accelerator.device_count()
        devices += [torch.device(accelerator.type, index) for index in range(count)]
    return devices


def best_device() -> torch.device:
    """Return the accelerator if one is available, else the CPU.

    Under `torchrun`, this is the accelerator with the index `LOCAL_RANK`. Some launchers show each
    process one accelerator only; then it is that one.

    Raises:
        OptionError: `LOCAL_RANK` is not the number of an accelerator.
    """
    device = None
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if device is None:
        return torch.device("cpu")
    variable = os.environ.get("LOCAL_RANK", "").strip()
    count = torch.accelerator.device_count()
    if variable in ("", "-1") or count == 1:  # -1: launchers' word for a single process
        return device
    if not variable.isdecimal() or int(variable) >= count:
        raise OptionError(
            f"the environment variable LOCAL_RANK must be the number of one of the {count} "
            f"devices, from 0 to {count - 1}, got {variable!r}; unset it, or use --device."
        )
    return torch.device(device.type, int(variable))


def supports_bf16(device: torch.device) -> bool:
    """Return whether a device computes natively in bfloat16.

    A CPU without bf16 instructions emulates them, which takes many times as long as float32
    (benchmarks/train-step.md). PyTorch without oneDNN, as on a Mac, has no fast bf16 matrix
    products either. NVIDIA GPUs before Ampere (T4, V100) also emulate them.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def hardware_name(device: torch.device) -> str:
    """Return the name of the accelerator, or the architecture and thread count of the CPU."""
    if device.type == "cpu":
        return f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"
    get_device_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(get_device_name(device)) if get_device_name else device.type


def memory_size(device: torch.device) -> int | None:
    """Return the memory of a device in bytes; None if it is unknown."""
    if device.type == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, AttributeError):  # not Linux
            return None
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    get_properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    size = getattr(get_properties(device), "total_memory", None) if get_properties else None
    return None if size is None else int(size)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which SDXL's networks generate images on a device.

    This is float16 on GPUs, as in PuLID's own programs: its error is an eighth of bfloat16's, and
    SDXL is published in it. diffusers decodes images in float32 then. A CPU has no fast float16:
    there it is bfloat16 if that is native, else float32.
    """
    if device.type in FLOAT16_DEVICES:
        return torch.float16
    return training_dtype(device)


def training_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of frozen networks in training, where float16 would overflow."""
    return torch.bfloat16 if supports_bf16(device) else torch.float32


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished everything that was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory`."""
    if device.type != "cpu":
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset is not None:  # Apple's GPUs have no such counter
            reset(device)
        return
    with suppress(OSError):  # Linux: the process's own high-water mark
        Path("/proc/self/clear_refs").write_text("5")


def release_memory() -> None:
    """Return memory of deleted networks to the system.

    glibc keeps what lies between blocks that are still in use.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory in GiB since `reset_peak_memory`; None if it is unknown.

    On a CPU this is the high-water mark of the process, which includes blocks that the allocator
    has freed but not returned. Only the figure of an accelerator is reliable.
    """
    if device.type != "cpu":
        max_memory_allocated = getattr(
            torch.get_device_module(device), "max_memory_allocated", None
        )
        if max_memory_allocated is None:
            return None
        return round(max_memory_allocated(device) / 2**30, 2)
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return round(int(match[1]) / 2**20, 2) if match else None
