"""FLUX and Chroma on smaller devices: named memory levels, and predictions of their memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from openpulid.errors import OptionError, suggest

GIB = 2**30


@dataclass(frozen=True)
class Level:
    """Where the parts of a FLUX pipeline are kept, and in which precision.

    Attributes:
        transformer: "resident" in bfloat16; "fp8" stored in 8 bits and computed in bfloat16 layer
            by layer; "streamed" from host memory, block by block.
        offloaded: text encoders, transformer and autoencoder are on the device one at a time.
        faces_on_cpu: the identity extractor stays on the host.
        tiled: the autoencoder decodes in tiles.
    """

    transformer: Literal["resident", "fp8", "streamed"]
    offloaded: bool
    faces_on_cpu: bool
    tiled: bool


LEVELS: dict[str, Level] = {
    "full": Level("resident", offloaded=False, faces_on_cpu=False, tiled=False),
    "24gb": Level("fp8", offloaded=True, faces_on_cpu=False, tiled=False),
    "16gb": Level("fp8", offloaded=True, faces_on_cpu=True, tiled=True),
    "12gb": Level("streamed", offloaded=True, faces_on_cpu=True, tiled=True),
}
"""Memory levels by name. All use features of diffusers: layerwise casting, model offload, group
offload with streams. The effect of 8 bits on identity similarity has not been measured. Streaming
costs only time."""

UNCAST_LAYERS = ("^norm_out$", "^proj_out$", "lora_")
"""Patterns of layers that keep their dtype in an 8-bit transformer: the last layers
and every LoRA. Norms keep theirs because only matrices are cast. diffusers' default pattern skips
everything whose name contains `norm`, and with it the modulation layers inside, which are more than
a quarter of the transformer."""

FLUX_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Configuration of FLUX.1's autoencoder."""

INFUSENET: dict[str, Any] = {
    "num_layers": 4,
    "num_single_layers": 10,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
"""Configuration of InfiniteYou's InfuseNet; it has one residual per block."""

INFUSENET_LEVELS = {"full": "full", "24gb": "24gb", "16gb": "12gb", "12gb": "12gb"}
"""Memory level of the pipeline -> that of InfuseNet. In 8 bits next to the transformer in 8 bits it
would not fit into 16 GB, so it is streamed."""

TILE = 512
"""Side of a tile in pixels. FLUX's default is 1024, the whole image."""

STREAMED_BLOCKS = 2
"""Transformer blocks on the device at a time: one computes while the next one is copied."""


def find_level(name: str) -> Level:
    """Return a memory level by name.

    Raises:
        OptionError: there is no such level.
    """
    if name not in LEVELS:
        raise OptionError(
            f"there is no memory level {name!r}{suggest(name, LEVELS)}; "
            f"choose one of {', '.join(LEVELS)}."
        )
    return LEVELS[name]


def place_pipeline(pipe: Any, name: str, device: torch.device) -> None:
    """Move a FLUX pipeline to a device as a memory level says.

    Args:
        pipe: the pipeline, on the CPU.
        name: the memory level.
        device: the device.
    """
    level = find_level(name)
    if level.tiled:
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size = TILE
        pipe.vae.tile_latent_min_size = TILE // pipe.vae_scale_factor
    is_quantized = getattr(pipe.transformer, "is_quantized", False)
    if level.transformer == "fp8" and not is_quantized:
        store_in_fp8(pipe.transformer)
    if device.type == "cpu":
        return
    if level.transformer == "streamed":
        _stream(pipe, device)
    elif level.offloaded:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def store_in_fp8(transformer: Any) -> None:
    """Store a transformer's matrices in 8 bits, except for `UNCAST_LAYERS`.

    Each layer is cast to its present dtype while it computes.
    """
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(
        transformer, torch.float8_e4m3fn, transformer.dtype, skip_modules_pattern=UNCAST_LAYERS
    )


def place_controlnet(network: Any, name: str, device: torch.device) -> None:
    """Keep a ControlNet as a memory level keeps the transformer.

    It computes inside of the transformer's call, and so is on the device together with it.

    Args:
        network: a FluxControlNetModel, on the CPU.
        name: the memory level.
        device: the device.
    """
    level = find_level(name)
    if level.transformer == "fp8":
        store_in_fp8(network)
    if level.transformer == "streamed" and device.type != "cpu":
        network.enable_group_offload(
            **_stream_options(device), offload_type="block_level", num_blocks_per_group=1
        )
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
    place_controlnet(adapter.infusenet.model, INFUSENET_LEVELS[name], device)
    adapter.infusenet.is_placed = True
    return adapter


def _stream_options(device: torch.device) -> dict[str, Any]:
    return {
        "onload_device": device,
        "offload_device": torch.device("cpu"),
        "use_stream": device.type in ("cuda", "xpu"),
    }


def _stream(pipe: Any, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    options = _stream_options(device)
    pipe.transformer.enable_group_offload(
        **options, offload_type="block_level", num_blocks_per_group=1
    )
    for name in ("text_encoder", "text_encoder_2"):
        if encoder := getattr(pipe, name, None):  # Chroma has one
            apply_group_offloading(encoder, **options, offload_type="leaf_level")
    pipe.vae.to(device)


@dataclass(frozen=True)
class MemoryUse:
    """Memory on the device in one phase of a generation.

    Attributes:
        phase: name of the phase.
        parts: component -> bytes.
    """

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.parts.values())


def predict_memory(
    name: str,
    width: int = 896,
    height: int = 1152,
    max_sequence_length: int = 512,
    family: str = "flux",
    method: str = "pulid",
) -> list[MemoryUse]:
    """Predict the memory of each phase from shapes and dtypes; the largest is the peak.

    Weights are counted exactly, activations by the largest tensors that are alive at the same time.

    Args:
        name: memory level.
        width: width of the image in pixels.
        height: height of the image in pixels.
        max_sequence_length: longest prompt in tokens of T5.
        family: "flux" or "chroma".
        method: PuLID, or InfiniteYou on FLUX.
    """
    level = find_level(name)
    sizes = dict(weight_sizes(family))
    num_residuals = 0
    if method.startswith("infiniteyou"):
        sizes |= infiniteyou_sizes()
        own_level = find_level(INFUSENET_LEVELS[name])
        sizes["adapter"] = _size_at(own_level, sizes, "InfuseNet") + sizes["projection"]
        num_residuals = INFUSENET["num_layers"] + INFUSENET["num_single_layers"]
    faces = 0 if level.faces_on_cpu else sizes["faces"]
    sizes["transformer"] = _size_at(level, sizes, "transformer")
    if level.transformer == "streamed":
        sizes["text"] //= 24  # one layer at a time
    image = (width // 16) * (height // 16)
    # tensors of a single block: hidden, residual, normalized, queries, keys, values, the four times
    # wider feed-forward twice, both concatenated
    alive = (image + max_sequence_length) * 3072 * 2 * (6 + 8 + 5)
    alive += image * 3072 * 2 * num_residuals
    area = min(width, TILE) * min(height, TILE) if level.tiled else width * height
    # the last level of the decoder: input, intermediate, output
    decode = area * (256 + 2 * 128) * 2
    always = {"adapter": sizes["adapter"], "identity": sizes["identity"], "faces": faces}
    if level.transformer == "streamed":
        # small compared with what streaming saves
        always["autoencoder"] = sizes["vae"]
    phases = {
        "text": {"text encoders": sizes["text"], "activations": max_sequence_length * 4096 * 2 * 8},
        "steps": {"transformer": sizes["transformer"], "activations": alive},
        "decode": {"autoencoder": sizes["vae"], "activations": decode},
    }
    if level.offloaded:
        return [MemoryUse(phase, {**parts, **always}) for phase, parts in phases.items()]
    weights = {
        "text encoders": sizes["text"],
        "transformer": sizes["transformer"],
        "autoencoder": sizes["vae"],
        **always,
    }
    return [
        MemoryUse(phase, {**weights, "activations": parts["activations"]})
        for phase, parts in phases.items()
    ]


def _size_at(level: Level, sizes: Mapping[str, int], name: str) -> int:
    """Return the bytes of a network of blocks on the device."""
    if level.transformer == "fp8":
        return sizes[f"{name} in fp8"]
    if level.transformer == "streamed":
        return STREAMED_BLOCKS * sizes[f"{name} block"] + sizes[f"{name} outside blocks"]
    return sizes[name]


@cache
def weight_sizes(family: str = "flux") -> dict[str, int]:
    """Count the bytes of the base model's and PuLID's parts in bfloat16, on the meta device.

    Args:
        family: "flux" or "chroma".
    """
    from diffusers import AutoencoderKL, ChromaTransformer2DModel, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from openpulid.identity.eva_clip import VisionEncoder
    from openpulid.methods.pulid import IDFormer, PuLIDFlux

    t5 = T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        transformer: Any = ChromaTransformer2DModel()
        if family == "flux":
            transformer = FluxTransformer2DModel(guidance_embeds=True)
        transformer = transformer.bfloat16()
        former = IDFormer()
        adapter = PuLIDFlux.for_transformer(transformer, former).bfloat16()
        vae = AutoencoderKL(**FLUX_VAE).bfloat16()
        text = weight_bytes(T5EncoderModel(t5).bfloat16())
        if family == "flux":
            text += weight_bytes(CLIPTextModel(clip).bfloat16())
        # plus the file sizes of face detector, recognition and parsing
        faces = weight_bytes(VisionEncoder().bfloat16()) + 330 * 10**6
        tokens = torch.empty(1, 32, former.config["output_dim"], dtype=torch.bfloat16)
        folded = [part for layer in adapter.layers for part in layer.precompute_kv(tokens)]
    return _block_sizes(transformer, "transformer") | {
        "text": text,
        "vae": weight_bytes(vae),
        "adapter": weight_bytes(adapter),
        # the identity's keys and values, and the unconditional ones of a negative prompt
        "identity": 2 * sum(part.nbytes for part in folded),
        "faces": faces,
    }


@cache
def infiniteyou_sizes() -> dict[str, int]:
    """Count the bytes of InfiniteYou's parts in bfloat16, on the meta device."""
    from diffusers import FluxControlNetModel
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    with torch.device("meta"):
        net = FluxControlNetModel(**INFUSENET).bfloat16()
        projection = IPAdapterPlusImageProjection(512, 4096, heads=20).bfloat16()
    return _block_sizes(net, "InfuseNet") | {
        "projection": weight_bytes(projection),
        "identity": 0,
        # file sizes of face detector and recognition
        "faces": 192 * 10**6,
    }


def _block_sizes(network: Any, name: str) -> dict[str, int]:
    """Count the bytes of a network of blocks as a whole, in 8 bits, and block by block.

    Args:
        network: in bfloat16, on the meta device; it is in 8 bits afterwards.
        name: how the sizes are called.
    """
    blocks = [
        weight_bytes(block)
        for block in (*network.transformer_blocks, *network.single_transformer_blocks)
    ]
    size = weight_bytes(network)
    store_in_fp8(network)
    return {
        name: size,
        f"{name} in fp8": weight_bytes(network),
        f"{name} block": max(blocks),
        f"{name} outside blocks": size - sum(blocks),
    }


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights in their present dtype."""
    return sum(parameter.nbytes for parameter in module.parameters())
