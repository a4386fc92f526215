"""The machine that the GPU report measures, and the networks it measures there: full size, or tiny to test the script."""

from __future__ import annotations

import gc
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from openpulid.bench.perf.inference import FluxTarget
from openpulid.bench.perf.training import RandomSDXL, default_dtype, random_base
from openpulid.device import best_device, compute_dtype, hardware_name
from openpulid.errors import OptionError

TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 1),
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
TINY_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
}
TINY_FLUX: dict[str, Any] = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
}


@dataclass(frozen=True)
class Machine:
    """Where and at which size the parts measure."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool = False

    @classmethod
    def find(cls, tiny: bool) -> Machine:
        """The accelerator; with tiny networks a CPU will do.

        Raises:
            OptionError: there is no accelerator.
        """
        device = best_device()
        if device.type == "cpu" and not tiny:
            raise OptionError("full size needs an accelerator and none is found; try --tiny.")
        return cls(device, compute_dtype(device), tiny)

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def backend(self) -> str:
        """Of torch.compile: on a CPU the tracer alone is tried."""
        return "eager" if self.on_cpu else "inductor"

    def reseed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def release(self) -> None:
        """Free what nothing refers to any more."""
        gc.collect()
        if not self.on_cpu:
            torch.accelerator.synchronize(self.device)
            torch.get_device_module(self.device).empty_cache()

    def reserved_gib(self) -> float | None:
        """The most memory that PyTorch has reserved since the last reset of its peaks."""
        most = getattr(torch.get_device_module(self.device), "max_memory_reserved", None)
        return None if most is None or self.on_cpu else round(most(self.device) / 2**30, 2)

    # -- networks with random weights --

    @property
    def pixels(self) -> int:
        return 16 if self.tiny else 1024

    def sdxl(self) -> RandomSDXL:
        if not self.tiny:
            return random_base("sdxl", self.device, self.dtype)
        with default_dtype(self.dtype), self.device:
            unet, vae = UNet2DConditionModel(**TINY_UNET), AutoencoderKL(**TINY_VAE)
        return RandomSDXL(unet, vae)

    def mini(self) -> RandomSDXL:
        return self.sdxl() if self.tiny else random_base("mini", self.device)

    def flux(self, text_tokens: int = 128) -> FluxTarget:
        if not self.tiny:
            return FluxTarget(self.device, self.dtype, text_tokens=text_tokens)
        return FluxTarget(self.device, self.dtype, 64, depth=0.1, text_tokens=4, **TINY_FLUX)


def describe(machine: Machine) -> dict[str, Any]:
    """Name and memory of the device, and versions."""
    facts: dict[str, Any] = {
        "device": hardware_name(machine.device),
        "memory_gib": None,
        "driver": driver(),
        "dtype": str(machine.dtype),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("diffusers", "transformers", "accelerate", "peft")},
    }
    if machine.device.type == "cuda":
        properties = torch.cuda.get_device_properties(machine.device)
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"Driver Version:\s*([\d.]+)", done.stdout)
    return found[1] if found else None


def difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference of two outputs over that of the first; NaN where one is not finite."""
    a, b = a.detach().float(), b.detach().float()
    return round(float((a - b).norm() / a.norm().clamp_min(1e-30)), 5)
