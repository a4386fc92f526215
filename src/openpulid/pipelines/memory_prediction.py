"""Predictions of the device memory of a generation, counted from shapes on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from openpulid.pipelines.memory_levels import (
    FLUX_LEVELS,
    INFUSENET_LEVELS,
    TILE,
    Level,
    find_level,
    store_in_fp8,
)
from openpulid.pipelines.model_set import Family

GIB = 2**30

FLUX_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Configuration of FLUX.1's autoencoder."""

SDXL_VAE: dict[str, Any] = {
    **FLUX_VAE,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
"""Configuration of SDXL's autoencoder."""

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""Configuration of SDXL's U-Net."""

CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
"""Configurations of SDXL's text encoders; FLUX.1 has the first one, too."""

T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
"""Configuration of the T5 encoder of FLUX.1 and Chroma."""

KLEIN_TRANSFORMER: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
"""Configuration of the transformer of FLUX.2 klein 4B."""

QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
"""Configuration of the text encoder of FLUX.2 klein 4B."""

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

FLUX_CONTROLNET: dict[str, Any] = {**INFUSENET, "num_layers": 6, "num_single_layers": 0}
"""Configuration of the published `control-flux-union`."""

FACE_FILES = 330 * 10**6
"""File sizes of face detector, face recognition and face parsing."""

DECODER_CHANNELS = 4 * 256
"""Channels of the last level of the decoder that are alive at a time, at full resolution: a
layer's input, normalized and activated, and the workspace of the convolution. Measured on an H200
with FLUX's autoencoder at 1024x1024: 2.2 GiB in bfloat16, of which this predicts 2.0."""

STREAMED_UNITS = 2
"""Blocks or layers on the device at a time: one computes while the next one is copied."""

UNCONDITIONAL = 2
"""Rows of a guided batch of one image of SDXL."""


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


@dataclass(frozen=True)
class BaseUse:
    """What the phases of one family need.

    Attributes:
        network: how the network is called.
        sizes: component -> bytes of weights; blocks and layers included.
        text: bytes of activations while the prompt is encoded.
        steps: bytes of activations in a step.
        decode_itemsize: bytes of a number in the autoencoder.
        adapter_on_cpu: whether the adapter computes once, and may stay on the host.
    """

    network: str
    sizes: Mapping[str, int]
    text: int
    steps: int
    decode_itemsize: int
    adapter_on_cpu: bool = False


def predict_memory(
    name: str,
    width: int = 896,
    height: int = 1152,
    max_sequence_length: int = 512,
    family: Family = "flux",
    method: str = "pulid",
    num_controls: int = 0,
) -> list[MemoryUse]:
    """Predict the memory of each phase from shapes and dtypes; the largest is the peak.

    Weights are counted exactly, activations by the largest tensors that are alive at the same time.
    One image at a time; on SDXL with guidance, so that the U-Net sees a pair.

    Args:
        name: memory level.
        width: width of the image in pixels.
        height: height of the image in pixels.
        max_sequence_length: longest prompt in tokens of T5.
        family: of the base model.
        method: PuLID, or InfiniteYou on FLUX.
        num_controls: ControlNets next to it, of the size of the published ones.
    """
    level = find_level(family, name)
    if family == "sdxl":
        base = _sdxl_use(width, height)
    else:
        base = _flux_use(name, width, height, max_sequence_length, family, method)
    sizes = base.sizes
    on_device = {
        "adapter": 0 if base.adapter_on_cpu and level.faces_on_cpu else sizes["adapter"],
        "identity": sizes["identity"],
        "faces": 0 if level.faces_on_cpu else sizes["faces"],
    }
    if num_controls:
        on_device["ControlNets"] = num_controls * _size_at(
            level, control_sizes(family), "ControlNet"
        )
    text = sizes["text"]
    if level.network == "streamed":
        text = STREAMED_UNITS * sizes["text layer"]
        on_device["autoencoder"] = sizes["vae"]  # small compared with what streaming saves
    area = min(width, TILE) * min(height, TILE) if level.tiled else width * height
    phases = {
        "text": {"text encoders": text, "activations": base.text},
        "steps": {
            base.network: _size_at(level, sizes, base.network),
            "activations": base.steps,
        },
        "decode": {
            "autoencoder": sizes["vae"],
            "activations": area * DECODER_CHANNELS * base.decode_itemsize,
        },
    }
    if level.offloaded:
        return [MemoryUse(phase, {**parts, **on_device}) for phase, parts in phases.items()]
    weights = {key: value for parts in phases.values() for key, value in parts.items()}
    weights |= on_device
    return [
        MemoryUse(phase, {**weights, "activations": parts["activations"]})
        for phase, parts in phases.items()
    ]


def _flux_use(
    name: str, width: int, height: int, text_tokens: int, family: Family, method: str
) -> BaseUse:
    sizes = dict(weight_sizes(family))
    num_residuals = 0
    if method.startswith("infiniteyou"):
        sizes |= infiniteyou_sizes()
        own_level = FLUX_LEVELS[INFUSENET_LEVELS[name]]
        sizes["adapter"] = _size_at(own_level, sizes, "InfuseNet") + sizes["projection"]
        num_residuals = INFUSENET["num_layers"] + INFUSENET["num_single_layers"]
    image = (width // 16) * (height // 16)
    # tensors of a single block: hidden, residual, normalized, queries, keys, values, the four times
    # wider feed-forward twice, both concatenated; in FLUX.2 it is three times wider, gated, and as
    # large in all
    steps = (image + text_tokens) * 3072 * 2 * (6 + 8 + 5)
    steps += image * 3072 * 2 * num_residuals
    text = 4096 * 8
    if family == "flux2":  # the outputs of all layers, and logits that nothing reads
        text = QWEN3_4B["hidden_size"] * (QWEN3_4B["num_hidden_layers"] + 1)
        text += QWEN3_4B["vocab_size"]
    return BaseUse("transformer", sizes, text_tokens * text * 2, steps, decode_itemsize=2)


def _sdxl_use(width: int, height: int) -> BaseUse:
    # the skips of the way down: at each level, the widths that the way up will read
    skips = 3 * 320 + (320 + 2 * 640) / 4 + (640 + 2 * 1280) / 16
    # a layer of the last level up: input with skip, normalized, activated, and its output
    largest = 3 * (640 + 320) + 320
    positions = (width // 8) * (height // 8)
    steps = UNCONDITIONAL * 2 * positions * (skips + largest)
    # in float16 SDXL's autoencoder overflows: it decodes in float32
    return BaseUse(
        "U-Net", sdxl_sizes(), 77 * 1280 * 2 * 8, int(steps), decode_itemsize=4, adapter_on_cpu=True
    )


def _size_at(level: Level, sizes: Mapping[str, int], name: str) -> int:
    """Return the bytes of a network on the device."""
    if level.network == "fp8":
        return sizes[f"{name} in fp8"]
    if level.network == "streamed":
        return STREAMED_UNITS * sizes[f"{name} unit"] + sizes[f"{name} outside units"]
    return sizes[name]


@cache
def weight_sizes(family: Family = "flux") -> dict[str, int]:
    """Count the bytes of the base model's and PuLID's parts in bfloat16, on the meta device.

    Args:
        family: one with a transformer.
    """
    from openpulid.identity.eva_clip import VisionEncoder
    from openpulid.methods.pulid import IDFormer, PuLIDFlux

    with torch.device("meta"):
        transformer, vae, encoders = _build_parts(family)
        for part in (transformer, vae, encoders):
            part.bfloat16()
        former = IDFormer()
        adapter = PuLIDFlux.for_transformer(transformer, former).bfloat16()
        vision_encoder = VisionEncoder().bfloat16()
        tokens = torch.empty(1, 32, former.config["output_dim"], dtype=torch.bfloat16)
        folded = [part for layer in adapter.layers for part in layer.precompute_kv(tokens)]
    return _network_sizes(transformer, "transformer") | {
        **_text_sizes(list(encoders)),
        "vae": weight_bytes(vae),
        "adapter": weight_bytes(adapter),
        # the identity's keys and values, and the unconditional ones of a negative prompt
        "identity": 2 * sum(part.nbytes for part in folded),
        "faces": weight_bytes(vision_encoder) + FACE_FILES,
    }


def _build_parts(family: Family) -> tuple[Any, nn.Module, nn.ModuleList]:
    """Build the transformer, the autoencoder and the text encoders of a family."""
    from diffusers import (
        AutoencoderKL,
        AutoencoderKLFlux2,
        ChromaTransformer2DModel,
        Flux2Transformer2DModel,
        FluxTransformer2DModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        Qwen3Config,
        Qwen3ForCausalLM,
        T5Config,
        T5EncoderModel,
    )

    if family == "flux2":
        qwen = nn.ModuleList([Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B))])
        return Flux2Transformer2DModel(**KLEIN_TRANSFORMER), AutoencoderKLFlux2(), qwen
    encoders = nn.ModuleList([T5EncoderModel(T5Config(**T5_XXL))])
    if family == "chroma":
        return ChromaTransformer2DModel(), AutoencoderKL(**FLUX_VAE), encoders
    encoders.append(CLIPTextModel(CLIPTextConfig(**CLIP_L)))
    return FluxTransformer2DModel(guidance_embeds=True), AutoencoderKL(**FLUX_VAE), encoders


@cache
def sdxl_sizes() -> dict[str, int]:
    """Count the bytes of SDXL's and PuLID v1.1's parts, on the meta device.

    Base model and identity layers are in float16. The autoencoder, the identity encoder and the
    vision encoder are in float32.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from openpulid.identity.eva_clip import VisionEncoder
    from openpulid.methods.pulid import IDFormer, PuLID

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET).half()
        adapter = PuLID.for_unet(unet, IDFormer())
        adapter.id_adapter_attn_layers.half()
        vae = AutoencoderKL(**SDXL_VAE)
        encoders = [
            CLIPTextModel(CLIPTextConfig(**CLIP_L)).half(),
            CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)).half(),
        ]
        vision_encoder = VisionEncoder()
        tokens = torch.empty(1, 32, SDXL_UNET["cross_attention_dim"])
        pairs = [part for pair in adapter.keys_values(tokens).values() for part in pair]
    # the identity's and nobody's, each in float32 and repeated for the batch in float16
    identity = UNCONDITIONAL * sum(part.nbytes + part.nbytes // 2 for part in pairs)
    return _network_sizes(unet, "U-Net") | {
        **_text_sizes(encoders),
        "vae": weight_bytes(vae),
        "adapter": weight_bytes(adapter),
        "identity": identity,
        "faces": weight_bytes(vision_encoder) + FACE_FILES,
    }


@cache
def control_sizes(family: Family) -> dict[str, int]:
    """Count the bytes of a ControlNet of a family in 16 bits, on the meta device."""
    from diffusers import ControlNetModel, FluxControlNetModel

    with torch.device("meta"):
        if family == "sdxl":
            unet = {key: value for key, value in SDXL_UNET.items() if key not in ONLY_UNET}
            net: Any = ControlNetModel(**unet)
        else:
            net = FluxControlNetModel(**FLUX_CONTROLNET)
        return _network_sizes(net.bfloat16(), "ControlNet")


ONLY_UNET = ("sample_size", "up_block_types")
"""Entries of a U-Net's configuration that a ControlNet does not have."""


@cache
def infiniteyou_sizes() -> dict[str, int]:
    """Count the bytes of InfiniteYou's parts in bfloat16, on the meta device."""
    from diffusers import FluxControlNetModel
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    with torch.device("meta"):
        net = FluxControlNetModel(**INFUSENET).bfloat16()
        projection = IPAdapterPlusImageProjection(512, 4096, heads=20).bfloat16()
    return _network_sizes(net, "InfuseNet") | {
        "projection": weight_bytes(projection),
        "identity": 0,
        # file sizes of face detector and recognition
        "faces": 192 * 10**6,
    }


def _network_sizes(network: Any, name: str) -> dict[str, int]:
    """Count the bytes of a network as a whole, in 8 bits, and by the units that are streamed.

    Args:
        network: in 16 bits, on the meta device; it is in 8 bits afterwards.
        name: how the sizes are called.
    """
    units = _streamed_units(network)
    size = weight_bytes(network)
    store_in_fp8(network)
    return {
        name: size,
        f"{name} in fp8": weight_bytes(network),
        f"{name} unit": max(units),
        f"{name} outside units": size - sum(units),
    }


def _streamed_units(network: Any) -> list[int]:
    """Return the bytes of the units that are streamed: a transformer's blocks, a U-Net's layers."""
    if hasattr(network, "transformer_blocks"):
        blocks = (*network.transformer_blocks, *network.single_transformer_blocks)
        return [weight_bytes(block) for block in blocks]
    return [weight_bytes(layer) for layer in network.modules() if not list(layer.children())]


def _text_sizes(encoders: list[nn.Module]) -> dict[str, int]:
    """Count the bytes of text encoders, and of their largest layer."""
    layers = [layer for encoder in encoders for layer in encoder.modules()]
    return {
        "text": sum(map(weight_bytes, encoders)),
        "text layer": max(weight_bytes(x) for x in layers if not list(x.children())),
    }


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights in their present dtype."""
    return sum(parameter.nbytes for parameter in module.parameters())
