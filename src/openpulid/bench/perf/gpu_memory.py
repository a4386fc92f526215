"""Memory levels of SDXL and FLUX in the GPU report: peak and time of each phase of a generation.

The face models are not included: they run before, and once per identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from openpulid.bench.perf.gpu_machine import TINY_VAE, Machine
from openpulid.bench.perf.gpu_report import Recorder
from openpulid.bench.perf.inference import SDXLTarget, SpeedTarget
from openpulid.bench.perf.random_models import TINY_CLIP, TINY_T5, default_dtype
from openpulid.bench.perf.timing import timed
from openpulid.device import peak_memory, reset_peak_memory, synchronize
from openpulid.pipelines.memory_levels import FLUX_LEVELS, SDXL_LEVELS, Level, place_pipeline
from openpulid.pipelines.memory_prediction import (
    CLIP_G,
    CLIP_L,
    FLUX_VAE,
    SDXL_VAE,
    T5_XXL,
    MemoryUse,
    predict_memory,
)

FLUX_TOKENS = 512
"""Length of FLUX's prompt."""
Figures = dict[str, Any]


def measure_flux_levels(recorder: Recorder, machine: Machine) -> None:
    """Measure FLUX's memory levels."""
    recorder.part.settings |= {
        "text tokens": FLUX_TOKENS,
        "16gb": "not measured separately: 24gb with the tiled decoding of 12gb",
    }
    needs = {"full": 8, "24gb": 20, "12gb": 35}
    _measure_levels(recorder, machine, needs, _build_flux, predict_memory)


def measure_sdxl_levels(recorder: Recorder, machine: Machine) -> None:
    """Measure SDXL's memory levels; a step is a guided pair, and the autoencoder is in float32."""
    needs = {"full": 8, "12gb": 10, "8gb": 15, "6gb": 25}
    predict = partial(predict_memory, family="sdxl")
    _measure_levels(recorder, machine, needs, _build_sdxl, predict)


def _measure_levels(
    recorder: Recorder,
    machine: Machine,
    needs: Mapping[str, float],
    build: Callable[[Machine, str], tuple[SpeedTarget, Any]],
    predict: Callable[..., list[MemoryUse]],
) -> None:
    """Measure memory levels, and predict them.

    Args:
        recorder: of the part.
        machine: where they run.
        needs: memory level -> seconds that must be left for it.
        build: returns a target and its pipeline, placed as a memory level says.
        predict: `predict_memory` of the family.
    """
    recorder.part.settings |= {
        "pixels": machine.pixels,
        "predicted_gib": "by `memory_prediction.predict_memory`, without the face models",
        "steps": "ms is the median of steps 2 and 3; first_s is step 1, including loading",
    }
    for level, needs_s in needs.items():
        run = partial(_measure_level, level, machine, build)
        recorder.attempt(level, run, 0 if machine.tiny else needs_s)
    if not machine.tiny:
        recorder.attempt("predicted", partial(_predict_memory, predict, list(needs)), 10)


@torch.no_grad()
def _measure_level(
    level: str, machine: Machine, build: Callable[[Machine, str], tuple[SpeedTarget, Any]]
) -> list[Figures]:
    """Measure encoding of the prompt, denoising steps and decoding at a memory level."""
    device = machine.device
    built: list[tuple[SpeedTarget, Any]] = []
    building_seconds = timed(lambda: built.append(build(machine, level)), device)
    ((target, pipe),) = built
    machine.release()
    phases = {
        "text": partial(_time_encoding, pipe, device),
        "steps": partial(_time_steps, target),
        "decode": partial(_time_decoding, pipe, machine),
    }
    rows = []
    for name, time_phase in phases.items():
        synchronize(device)
        reset_peak_memory(device)
        first, *following = time_phase()
        row: Figures = {
            "phase": name,
            "ms": round(median(following) * 1000, 1),
            "first_s": round(first, 2),
            "peak_gib": peak_memory(device),
        }
        rows.append(row)
    rows[0]["building_s"] = round(building_seconds, 1)
    return rows


def _predict_memory(
    predict: Callable[..., list[MemoryUse]], levels: Sequence[str]
) -> list[Figures]:
    """Return the prediction for each level and phase, without the face models."""
    rows = []
    for level in levels:
        for use in predict(level, 1024, 1024):
            size = use.total - use.parts["faces"]
            rows.append({"phase": f"{level}: {use.phase}", "predicted_gib": round(size / 2**30, 2)})
    return rows


# -- phases --


def _time_encoding(pipe: Any, device: torch.device) -> list[float]:
    """Return the seconds of two calls of both text encoders."""
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    ids: list[Tensor] = []
    for encoder in encoders:
        length = getattr(encoder.config, "max_position_embeddings", FLUX_TOKENS)
        ids.append(torch.ones(1, length, dtype=torch.long, device=device))

    def encode() -> None:
        for encoder, tokens in zip(encoders, ids, strict=True):
            encoder(tokens)

    return [timed(encode, device) for _ in range(2)]


def _time_steps(target: SpeedTarget) -> list[float]:
    """Return the seconds of three steps with an identity."""
    with target.use_identity():
        return [timed(target.step, target.device) for _ in range(3)]


def _time_decoding(pipe: Any, machine: Machine) -> list[float]:
    """Return the seconds of two calls of the decoder."""
    side = machine.pixels // pipe.vae_scale_factor
    shape = (1, pipe.vae.config.latent_channels, side, side)
    latents = torch.randn(shape, device=machine.device, dtype=pipe.vae.dtype)

    def decode() -> None:
        pipe.vae.decode(latents, return_dict=False)

    return [timed(decode, machine.device) for _ in range(2)]


# -- pipelines with random weights --


def _build_flux(machine: Machine, level: str) -> tuple[SpeedTarget, Any]:
    """Build FLUX.1 at its published sizes, or a tiny one."""
    target = machine.build_flux(text_tokens=FLUX_TOKENS)
    with default_dtype(machine.dtype), machine.device:
        if machine.tiny:
            clip, t5 = CLIPTextConfig(**TINY_CLIP), T5Config(**TINY_T5)
            vae = AutoencoderKL(**TINY_VAE)
        else:
            clip, t5 = CLIPTextConfig(**CLIP_L), T5Config(**T5_XXL)
            vae = AutoencoderKL(**FLUX_VAE)
        encoders = CLIPTextModel(clip), T5EncoderModel(t5)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, vae, encoders[0], None, encoders[1], None, target.transformer)
    _place(pipe, FLUX_LEVELS[level], machine.device)
    return target, pipe


def _build_sdxl(machine: Machine, level: str) -> tuple[SpeedTarget, Any]:
    """Build SDXL at its published sizes, or a tiny one."""
    base = machine.build_sdxl()
    target = SDXLTarget(base, machine.pixels, guided=True)
    with default_dtype(machine.dtype), machine.device:
        if machine.tiny:
            first = second = CLIPTextConfig(**TINY_CLIP)
        else:
            first, second = CLIPTextConfig(**CLIP_L), CLIPTextConfig(**CLIP_G)
        encoders = CLIPTextModel(first), CLIPTextModelWithProjection(second)
    with machine.device:  # it decodes in float32, see `memory_prediction`
        vae = AutoencoderKL(**(TINY_VAE if machine.tiny else SDXL_VAE))
    pipe = StableDiffusionXLPipeline(vae, *encoders, None, None, base.unet, base.pipe.scheduler)
    if SDXL_LEVELS[level].faces_on_cpu:
        target.adapter.to("cpu")
        target.tokens, target.unconditional = target.tokens.cpu(), target.unconditional.cpu()
    _place(pipe, SDXL_LEVELS[level], machine.device)
    return target, pipe


def _place(pipe: Any, level: Level, device: torch.device) -> None:
    """Freeze a pipeline, and keep its parts as a memory level says."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    place_pipeline(pipe, level, device)
