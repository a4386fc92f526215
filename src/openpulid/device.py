"""Device, dtype and memory queries."""

from __future__ import annotations

import os
import platform

import torch


def best_device() -> torch.device:
    """The accelerator, where there is one that works; of several that this process was started for (`torchrun`)."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return torch.device("cpu")
    place = os.environ.get("LOCAL_RANK")
    return torch.device(found.type, int(place)) if place else found


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is worth it there. A processor without instructions for it emulates them, which takes many times as long
    as float32 (benchmarks/train-step.md); PyTorch without oneDNN, as on a Mac, has no fast products of it either. NVIDIA's GPUs
    before Ampere (T4, V100) emulate them, too.
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
    """What computes there, in words: an accelerator's name, or a processor's kind and threads."""
    if device.type == "cpu":
        return f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(named(device)) if named else device.type


def compute_dtype(device: torch.device) -> torch.dtype:
    """What networks of full size compute in there: bfloat16; where that does not pay, float32 on a processor and float16 on a
    GPU, where diffusers itself decodes SDXL's pictures in float32.
    """
    if supports_bf16(device):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else torch.float16
