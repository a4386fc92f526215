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
"""All of them use what diffusers has: layerwise casting, model offload, group offload with streams. What eight bits cost in
likeness has not been measured; streaming costs time and nothing else."""

KEPT = ("^norm_out$", "^proj_out$", "lora_")
"""Names of what stays as it is where the transformer is stored in eight bits: the last layers, and every LoRA. Norms do anyway,
since only matrices are cast. diffusers' own rule passes over whatever is called a norm, and so over the modulation inside: more
than a quarter of the transformer."""

TILE = 512
"""Pixels on a side of a tile. Of itself FLUX's autoencoder takes 1024, which is the whole picture."""

STREAMED_BLOCKS = 2
"""Blocks of the transformer on the device at a time: while one computes the next one comes. diffusers streams one by one."""


def find_level(name: str) -> Level:
    """The level called `name`. Raises OptionError that lists what there is."""
    if name not in LEVELS:
        raise OptionError(
            f"there is no memory level {name!r}; the known ones are {', '.join(LEVELS)}."
        )
    return LEVELS[name]


def place(pipe: Any, name: str, device: torch.device) -> None:
    """Puts a FLUX pipeline on a device by a level; the base stays the one that was chosen."""
    chosen = find_level(name)
    if chosen.tiled:
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = (
            TILE,
            TILE // pipe.vae_scale_factor,
        )
    if chosen.transformer == "fp8" and not getattr(
        pipe.transformer, "is_quantized", False
    ):  # one that is small stays
        store_in_eight_bits(pipe.transformer)
    if device.type == "cpu":
        return  # there is nowhere to go
    if chosen.transformer == "streamed":
        _stream(pipe, device)
    elif chosen.offloaded:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def store_in_eight_bits(transformer: Any) -> None:
    """Its matrices, but for those in `KEPT`: each is computed in the dtype that it has now, and small before and after."""
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(
        transformer, torch.float8_e4m3fn, transformer.dtype, skip_modules_pattern=KEPT
    )


def _stream(pipe: Any, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    known = {
        "onload_device": device,
        "offload_device": torch.device("cpu"),
        "use_stream": device.type in ("cuda", "xpu"),
    }
    pipe.transformer.enable_group_offload(
        **known, offload_type="block_level", num_blocks_per_group=1
    )
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


def predict_memory(
    name: str, width: int = 896, height: int = 1152, text_tokens: int = 512
) -> list[Need]:
    """What each phase takes on the device, from shapes and dtypes alone; the largest is the peak.

    Weights are counted exactly, activations by the largest tensors that are alive together: a prediction, not a measurement.
    """
    chosen = find_level(name)
    sizes = _weights()
    faces = 0 if chosen.faces_on_cpu else sizes["faces"]
    if chosen.transformer == "fp8":
        sizes["transformer"] = sizes["eight bits"]
    elif chosen.transformer == "streamed":
        sizes["transformer"] = STREAMED_BLOCKS * sizes["block"] + sizes["around"]
        sizes["text"] //= 24  # a layer at a time
    image = (width // 16) * (height // 16)
    # a single block: hidden, residual, normalised, queries, keys, values, the four-fold feed-forward twice, both joined
    alive = (image + text_tokens) * 3072 * 2 * (6 + 8 + 5)
    area = min(width, TILE) * min(height, TILE) if chosen.tiled else width * height
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
    weights = {
        "text encoders": sizes["text"],
        "transformer": sizes["transformer"],
        "autoencoder": sizes["vae"],
        **always,
    }
    return [
        Need(phase, {**weights, "activations": parts["activations"]})
        for phase, parts in phases.items()
    ]


def _weights() -> dict[str, int]:
    """Bytes in bfloat16 of FLUX.1's parts and PuLID's, and of the transformer in eight bits, counted on the meta device."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from openpulid.identity.eva_clip import VisionEncoder
    from openpulid.methods.pulid.encoders import IDFormer
    from openpulid.methods.pulid.flux import PuLIDFlux

    t5 = T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True).bfloat16()
        former = IDFormer()
        adapter = PuLIDFlux.for_transformer(transformer, former).bfloat16()
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).bfloat16()  # fmt: skip
        text = stored(T5EncoderModel(t5).bfloat16()) + stored(CLIPTextModel(clip).bfloat16())
        faces = (
            stored(VisionEncoder().bfloat16()) + 330 * 10**6
        )  # and detector, recogniser, parsing: their files' sizes
        tokens = torch.empty(1, 32, former.config["output_dim"], dtype=torch.bfloat16)
        folded = [part for layer in adapter.layers for part in layer.precompute_kv(tokens)]
    blocks = [
        stored(block)
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    ]
    whole = stored(transformer)
    store_in_eight_bits(transformer)
    return {
        "transformer": whole,
        "eight bits": stored(transformer),
        "block": max(blocks),
        "around": whole - sum(blocks),
        "text": text,
        "vae": stored(vae),
        "adapter": stored(adapter),
        "identity": 2
        * sum(part.nbytes for part in folded),  # somebody's, and nobody's beside a negative prompt
        "faces": faces,
    }


def stored(module: nn.Module) -> int:
    """Bytes of a module's weights, as they are now."""
    return sum(parameter.nbytes for parameter in module.parameters())
