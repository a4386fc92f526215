"""FLUX on smaller devices: where each part lies and in which precision, by name, and what that will take at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from openpulid.errors import OptionError

GIB = 2**30


@dataclass(frozen=True)
class Level:
    """One way of living with less memory.

    Attributes:
        transformer: "resident" in bfloat16; "fp8" stored in eight bits and computed in bfloat16 layer by layer; "streamed"
            from the host's memory, block by block.
        offloaded: text encoders, transformer and autoencoder are on the device by turns.
        faces_on_cpu: what reads faces stays on the host.
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
"""All of them use what diffusers has: layerwise casting, model offload, group offload with streams. Eight bits cost a little
likeness in fine features; streaming costs time and nothing else."""

STREAMED_BLOCKS = 2
"""Blocks of the transformer on the device at a time: while one computes the next one comes. diffusers streams one by one."""


def level(name: str) -> Level:
    """The level called `name`. Raises OptionError that lists what there is."""
    if name not in LEVELS:
        raise OptionError(f"there is no memory level {name!r}; the known ones are {', '.join(LEVELS)}.")
    return LEVELS[name]


def place(pipe: Any, name: str, device: torch.device) -> None:
    """Puts a FLUX pipeline on a device by a level; the base stays the one that was chosen."""
    chosen = level(name)
    if chosen.tiled:
        pipe.vae.enable_tiling()
    if chosen.transformer == "fp8" and not getattr(pipe.transformer, "is_quantized", False):  # one that is small stays
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipe.transformer.dtype)
    if device.type == "cpu":
        return  # there is nowhere to go
    if chosen.transformer == "streamed":
        _stream(pipe, device)
    elif chosen.offloaded:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def _stream(pipe: Any, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    known = {"onload_device": device, "offload_device": torch.device("cpu"), "use_stream": device.type in ("cuda", "xpu")}
    pipe.transformer.enable_group_offload(**known, offload_type="block_level", num_blocks_per_group=1)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        apply_group_offloading(encoder, **known, offload_type="leaf_level")
    pipe.vae.to(device)


@dataclass(frozen=True)
class Need:
    """One phase of a generation: what is on the device then, in bytes by component."""

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def predicted(name: str, width: int = 896, height: int = 1152, text_tokens: int = 512) -> list[Need]:
    """What each phase takes on the device, from shapes and dtypes alone; the largest is the peak.

    Weights are counted exactly, activations by the largest tensors that are alive together: a prediction, not a measurement.
    """
    chosen = level(name)
    sizes = _weights()
    faces = 0 if chosen.faces_on_cpu else sizes["faces"]
    if chosen.transformer == "fp8":
        sizes["transformer"] //= 2
    elif chosen.transformer == "streamed":
        sizes["transformer"] = STREAMED_BLOCKS * sizes["block"] + sizes["around"]
        sizes["text"] //= 24  # a layer at a time
    image = (width // 16) * (height // 16)
    # a single block: hidden, residual, normalised, queries, keys, values, the four-fold feed-forward twice, both joined
    alive = (image + text_tokens) * 3072 * 2 * (6 + 8 + 5)
    area = min(width * height, 512 * 512) if chosen.tiled else width * height
    decode = area * (256 + 2 * 128) * 2  # the last level of the decoder: in, between, out
    always = {"adapter": sizes["adapter"], "identity": sizes["identity"], "faces": faces}
    if chosen.transformer == "streamed":
        always["autoencoder"] = sizes["vae"]  # small beside what streaming spares: it stays
    phases = {
        "text": {"text encoders": sizes["text"], "activations": text_tokens * 4096 * 2 * 8},
        "steps": {"transformer": sizes["transformer"], "activations": alive},
        "decode": {"autoencoder": sizes["vae"], "activations": decode},
    }
    if chosen.offloaded:
        return [Need(phase, {**parts, **always}) for phase, parts in phases.items()]
    weights = {"text encoders": sizes["text"], "transformer": sizes["transformer"], "autoencoder": sizes["vae"], **always}
    return [Need(phase, {**weights, "activations": parts["activations"]}) for phase, parts in phases.items()]


def _weights() -> dict[str, int]:
    """Bytes in bfloat16 of FLUX.1's parts and PuLID's, counted on the meta device."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from openpulid.identity.vision import VisionTower
    from openpulid.methods.pulid.encoders import IDFormer
    from openpulid.methods.pulid.flux import PuLIDFlux

    t5 = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        former = IDFormer()
        adapter = PuLIDFlux.for_transformer(transformer, former)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text = _bytes(T5EncoderModel(t5)) + _bytes(CLIPTextModel(clip))
        faces = _bytes(VisionTower()) + 60 * 10**6  # and detector, parsing
        tokens = torch.empty(1, 32, former.config["output_dim"])
        folded = [part for layer in adapter._layers() for part in layer.fold(tokens)]
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    whole = _bytes(transformer)
    return {
        "transformer": whole,
        "block": max(map(_bytes, blocks)),
        "around": whole - sum(map(_bytes, blocks)),
        "text": text,
        "vae": _bytes(vae),
        "adapter": _bytes(adapter),
        "identity": 2 * sum(part.numel() for part in folded),
        "faces": faces,
    }


def _bytes(module: nn.Module) -> int:
    return 2 * sum(parameter.numel() for parameter in module.parameters())
