"""Base models on smaller devices: named memory levels, and how they place a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from openpulid.errors import OptionError, suggest
from openpulid.pipelines.model_set import FAMILIES, Family


@dataclass(frozen=True)
class Level:
    """Where the parts of a pipeline are kept, and in which precision.

    Attributes:
        network: "resident" in the precision in which it computes; "fp8" stored in 8 bits and
            computed in that precision layer by layer; "streamed" from host memory: FLUX's
            transformer block by block, SDXL's U-Net layer by layer.
        offloaded: text encoders, network and autoencoder are on the device one at a time.
        faces_on_cpu: the identity extractor stays on the host, and with it PuLID's adapter for
            SDXL, which computes once per identity. FLUX's computes in every step.
        tiled: the autoencoder decodes in tiles.
    """

    network: Literal["resident", "fp8", "streamed"]
    offloaded: bool
    faces_on_cpu: bool
    tiled: bool


FLUX_LEVELS: dict[str, Level] = {
    "full": Level("resident", offloaded=False, faces_on_cpu=False, tiled=False),
    "24gb": Level("fp8", offloaded=True, faces_on_cpu=False, tiled=False),
    "16gb": Level("fp8", offloaded=True, faces_on_cpu=True, tiled=True),
    "12gb": Level("streamed", offloaded=True, faces_on_cpu=True, tiled=True),
}

SDXL_LEVELS: dict[str, Level] = {
    "full": Level("resident", offloaded=False, faces_on_cpu=False, tiled=False),
    "12gb": Level("resident", offloaded=True, faces_on_cpu=False, tiled=False),
    "8gb": Level("fp8", offloaded=True, faces_on_cpu=True, tiled=True),
    "6gb": Level("streamed", offloaded=True, faces_on_cpu=True, tiled=True),
}
"""Each leaves room for a ControlNet, which is kept like the U-Net."""

LEVELS: dict[Family, Mapping[str, Level]] = {
    family: SDXL_LEVELS if family == "sdxl" else FLUX_LEVELS for family in FAMILIES
}
"""Memory levels by family and name. All use features of diffusers: layerwise casting, model
offload, group offload with streams. The effect of 8 bits on identity similarity has not been
measured. Streaming costs only time."""

UNCAST_LAYERS = (
    *("^norm_out$", "^proj_out$"),
    *("^conv_in$", "^conv_out$", "^time_embedding$", "^add_embedding$"),
    "lora_",
)
"""Patterns of layers that keep their dtype in an 8-bit network: the last layers of a transformer;
the first and last layers of a U-Net and what embeds its timestep; every LoRA. Norms keep theirs
because only matrices are cast. diffusers' default pattern skips everything whose name contains
`norm`, and with it the modulation layers inside, which are more than a quarter of FLUX's
transformer."""

INFUSENET_LEVELS = {"full": "full", "24gb": "24gb", "16gb": "12gb", "12gb": "12gb"}
"""Memory level of the pipeline -> that of InfuseNet. In 8 bits next to the transformer in 8 bits it
would not fit into 16 GB, so it is streamed."""

TILE = 512
"""Side of a tile in pixels. The default of FLUX and SDXL is 1024, the whole image."""


def find_level(family: Family, name: str) -> Level:
    """Return a memory level of a family by name.

    Raises:
        OptionError: there is no such level.
    """
    levels = LEVELS[family]
    if name not in levels:
        raise OptionError(
            f"there is no memory level {name!r} for {FAMILIES[family].name}"
            f"{suggest(name, levels)}; choose one of {', '.join(levels)}."
        )
    return levels[name]


def place_pipeline(pipe: Any, level: Level, device: torch.device) -> None:
    """Move a pipeline to a device as a memory level says.

    Args:
        pipe: a pipeline of SDXL, or of FLUX or a relative, on the CPU.
        level: the memory level.
        device: the device.
    """
    network = find_network(pipe)
    if level.tiled:
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size = TILE
        pipe.vae.tile_latent_min_size = TILE // pipe.vae_scale_factor
    if level.network == "fp8" and not getattr(network, "is_quantized", False):
        store_in_fp8(network)
    if device.type == "cpu":
        return
    if level.network == "streamed":
        stream_pipeline(pipe, device)
    elif level.offloaded:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def find_network(pipe: Any) -> Any:
    """Return the network of a pipeline that runs in every step: its U-Net or transformer."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def store_in_fp8(network: Any) -> None:
    """Store a network's matrices and convolutions in 8 bits, except for `UNCAST_LAYERS`.

    Each layer is cast to its present dtype while it computes.
    """
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(
        network, torch.float8_e4m3fn, network.dtype, skip_modules_pattern=UNCAST_LAYERS
    )


def place_controlnet(network: Any, level: Level, device: torch.device) -> None:
    """Keep a ControlNet as a memory level keeps the network.

    It computes inside of the network's call, and so is on the device together with it.

    Args:
        network: a ControlNetModel or FluxControlNetModel, on the CPU.
        level: the memory level.
        device: the device.
    """
    if level.network == "fp8":
        store_in_fp8(network)
    if level.network == "streamed" and device.type != "cpu":
        stream_network(network, device)
    else:
        network.to(device)


def place_infiniteyou(adapter: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Keep InfiniteYou as a memory level says, see `INFUSENET_LEVELS`.

    Args:
        adapter: an InfiniteYou, on the CPU.
        name: the memory level.
        device: the device.
        dtype: in which its networks compute.

    Returns:
        The adapter.
    """
    if name == "full":
        return adapter.to(device, dtype)
    adapter.projection.to(device, dtype)
    adapter.infusenet.to(torch.device("cpu"), dtype)
    level = FLUX_LEVELS[INFUSENET_LEVELS[name]]
    place_controlnet(adapter.infusenet.model, level, device)
    adapter.infusenet.is_placed = True
    return adapter


def stream_pipeline(pipe: Any, device: torch.device) -> None:
    """Stream network and text encoders from host memory; the autoencoder stays on the device."""
    from diffusers.hooks import apply_group_offloading

    stream_network(find_network(pipe), device)
    for name in ("text_encoder", "text_encoder_2"):
        if encoder := getattr(pipe, name, None):  # Chroma and FLUX.2 have one
            options = _stream_options(device)
            apply_group_offloading(encoder, **options, offload_type="leaf_level")
    pipe.vae.to(device)


def stream_network(network: Any, device: torch.device) -> None:
    """Stream a network from host memory: a transformer by blocks, a U-Net by layers.

    The largest block of SDXL's U-Net is almost half of it.
    """
    units: dict[str, Any] = {"offload_type": "leaf_level"}
    if hasattr(network, "transformer_blocks"):
        units = {"offload_type": "block_level", "num_blocks_per_group": 1}
    network.enable_group_offload(**_stream_options(device), **units)


def _stream_options(device: torch.device) -> dict[str, Any]:
    return {
        "onload_device": device,
        "offload_device": torch.device("cpu"),
        "use_stream": device.type in ("cuda", "xpu"),
    }
