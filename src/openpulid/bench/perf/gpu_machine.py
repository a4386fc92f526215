"""Machine and networks of the GPU report: full size, or tiny to test the script."""

from __future__ import annotations

import gc
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from openpulid.bench.perf.gpu_report import PartSkipped
from openpulid.bench.perf.inference import FluxTarget
from openpulid.bench.perf.random_models import (
    RandomFlux,
    RandomSDXL,
    default_dtype,
    random_base,
)
from openpulid.device import best_device, hardware_name, training_dtype
from openpulid.errors import OptionError
from openpulid.pipelines.memory_prediction import FLUX_VAE
from openpulid.pipelines.presets import MINIATURE

TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "norm_num_groups": 8,
    "attention_head_dim": (2,),
    "transformer_layers_per_block": (1,),
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
    """Device on which the parts run, and size of the networks.

    Attributes:
        device: the accelerator, or the CPU for tiny networks.
        dtype: of weights and activations.
        tiny: whether networks are tiny, to test the script.
    """

    device: torch.device
    dtype: torch.dtype
    tiny: bool = False

    @classmethod
    def detect(cls, tiny: bool) -> Machine:
        """Select the accelerator, or for tiny networks the CPU if there is no accelerator.

        Raises:
            OptionError: full size without an accelerator.
        """
        device = best_device()
        if device.type == "cpu" and not tiny:
            raise OptionError("no accelerator is available: use --tiny to test the script.")
        return cls(device, training_dtype(device), tiny)

    @property
    def is_cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.device.type == "cpu"

    @property
    def compile_backend(self) -> str:
        """Backend of `torch.compile`; on a CPU only tracing is tested."""
        return "eager" if self.is_cpu else "inductor"

    def set_seed(self, seed: int) -> None:
        """Seed PyTorch's random number generators."""
        torch.manual_seed(seed)

    def release(self) -> None:
        """Free memory that is not in use."""
        gc.collect()
        if not self.is_cpu:
            torch.accelerator.synchronize(self.device)
            torch.get_device_module(self.device).empty_cache()

    def max_reserved_gib(self) -> float | None:
        """Return the peak memory reserved by PyTorch since `reset_peak_memory`, if known."""
        module = torch.get_device_module(self.device)
        max_memory_reserved = getattr(module, "max_memory_reserved", None)
        if self.is_cpu or max_memory_reserved is None:
            return None
        return round(max_memory_reserved(self.device) / 2**30, 2)

    # -- networks with random weights --

    @property
    def pixels(self) -> int:
        """Width and height of SDXL's images and of full-size FLUX's."""
        return 16 if self.tiny else 1024

    def build_sdxl(self) -> RandomSDXL:
        """Build SDXL."""
        if not self.tiny:
            return random_base("sdxl", self.device, self.dtype)
        with default_dtype(self.dtype), self.device:
            unet = UNet2DConditionModel(**TINY_UNET)
            vae = AutoencoderKL(**TINY_VAE)
        return RandomSDXL(unet, vae)

    def require_miniature(self) -> None:
        """Check that the configuration of the miniature's networks is installed.

        Raises:
            PartSkipped: the package has no weights of the miniature.
        """
        if not self.tiny and not (MINIATURE / "pipeline").is_dir():
            raise PartSkipped("the miniature's weights are not there")

    def build_miniature(self) -> RandomSDXL:
        """Build the miniature's base model in float32."""
        return self.build_sdxl() if self.tiny else random_base("mini", self.device)

    def build_flux(self, text_tokens: int = 128) -> FluxTarget:
        """Build FLUX's transformer with an adapter; tiny networks have prompts of 4 tokens."""
        if not self.tiny:
            return FluxTarget(self.device, self.dtype, text_tokens=text_tokens)
        return FluxTarget(self.device, self.dtype, pixels=64, depth=0.1, text_tokens=4, **TINY_FLUX)

    def build_flux_model(self, pixels: int, text_tokens: int) -> RandomFlux:
        """Build FLUX as a training base; a tiny one has prompts of 4 tokens."""
        sizes: dict[str, Any] = {}
        vae_sizes = {**FLUX_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
        if self.tiny:
            sizes = {**TINY_FLUX, "num_layers": 2, "num_single_layers": 4, "in_channels": 16}
            vae_sizes = {**TINY_VAE, "shift_factor": 0.1159}
            text_tokens = 4
        with default_dtype(self.dtype), self.device:
            transformer = FluxTransformer2DModel(guidance_embeds=True, **sizes)
            vae = AutoencoderKL(**vae_sizes)
        return RandomFlux(transformer, vae, pixels, text_tokens)


def describe_machine(machine: Machine) -> dict[str, Any]:
    """Return name and memory of the device, and library versions."""
    description: dict[str, Any] = {
        "device": hardware_name(machine.device),
        "memory_gib": None,
        "driver": driver_version(),
        "dtype": str(machine.dtype),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("diffusers", "transformers", "accelerate", "peft")},
    }
    if machine.device.type == "cuda":
        properties = torch.cuda.get_device_properties(machine.device)
        description["memory_gib"] = round(properties.total_memory / 2**30, 1)
        description["multiprocessors"] = properties.multi_processor_count
        description["cudnn"] = torch.backends.cudnn.version()
    return description


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, or None without one."""
    try:
        result = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"Driver Version:\s*([\d.]+)", result.stdout)
    return match[1] if match else None


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the norm of b - a relative to the norm of a; NaN if a value is not finite."""
    a = a.detach().float()
    b = b.detach().float()
    return round(float((a - b).norm() / a.norm().clamp_min(1e-30)), 5)
