"""Inference parts of the GPU report: steps of SDXL and FLUX, and FLUX's memory levels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from openpulid.bench.perf.gpu_machine import Machine, relative_difference
from openpulid.bench.perf.gpu_report import Recorder
from openpulid.bench.perf.inference import (
    NUM_TOKENS,
    FluxTarget,
    SDXLTarget,
    SpeedTarget,
    TwoPasses,
    compile_blocks,
    measure,
)
from openpulid.bench.perf.random_models import default_dtype
from openpulid.bench.perf.timing import interleave, medians, ratios, timed
from openpulid.device import peak_memory, reset_peak_memory, synchronize
from openpulid.pipelines.memory_levels import FLUX_LEVELS, place_pipeline
from openpulid.pipelines.memory_prediction import predict_memory

LABELS = {
    "base": "base",
    "pulid": "with identity",
    "recomputed": "identity recomputed every step",
    "base, two passes": "base in two calls",
    "pulid, two passes": "with identity in two calls",
    "recomputed, two passes": "identity recomputed in two calls",
}
"""Labels of the candidates of `inference.measure`."""

SDXL_ROUNDS = 15
FLUX_ROUNDS = 6
Figures = dict[str, Any]


# -- eager --


def measure_sdxl(recorder: Recorder, machine: Machine) -> None:
    """Measure the U-Net with and without an identity, for one image and a guided pair."""
    recorder.part.settings |= {
        "pixels": machine.pixels,
        "identity": f"v1.1: {NUM_TOKENS} tokens, 20 zeros, ortho_v2, scale 0.8",
        "rounds": SDXL_ROUNDS,
    }
    base = machine.build_sdxl()

    def run(guided: bool) -> list[Figures]:
        target = SDXLTarget(base, machine.pixels, guided=guided)
        return _measure_steps(target, machine, SDXL_ROUNDS)

    recorder.attempt("batch 1", partial(run, guided=False))
    recorder.attempt("batch 2, guided", partial(run, guided=True))


class GuidedFlux:
    """A `SpeedTarget` for guided steps of FLUX: one call per prompt, the negative prompt last.

    Args:
        target: one call with the prompt.
    """

    two_passes: TwoPasses | None = None

    def __init__(self, target: FluxTarget) -> None:
        self.target = target
        self.device = target.device
        self.unconditional = torch.randn_like(target.tokens)

    def step(self) -> Tensor:
        """Call the transformer twice and return the output of the second call."""
        self.target.step()
        return self.target.predict()

    def use_identity(self) -> AbstractContextManager[Any]:
        """Open a context in which an identity is in use."""
        return self.target.adapter.use_tokens(self.target.tokens, negative=self.unconditional)

    def time_identity(self) -> AbstractContextManager[list[float]]:
        """Open a context that measures the seconds of identity attention."""
        return self.target.time_identity()


def measure_flux(recorder: Recorder, machine: Machine) -> None:
    """Measure the transformer with and without an identity, for one call and a guided pair."""
    target = machine.build_flux()
    text_tokens = target.call["encoder_hidden_states"].shape[1]
    recorder.part.settings |= {
        "pixels": machine.pixels,
        "text tokens": text_tokens,
        "identity": f"{NUM_TOKENS} tokens after every 2nd double and every 4th single block",
        "rounds": FLUX_ROUNDS,
    }
    recorder.attempt("one call", lambda: _measure_steps(target, machine, FLUX_ROUNDS))
    guided = GuidedFlux(target)
    recorder.attempt("guided, two calls", lambda: _measure_steps(guided, machine, FLUX_ROUNDS))


@torch.inference_mode()
def _measure_steps(target: SpeedTarget, machine: Machine, rounds: int) -> list[Figures]:
    """Measure all candidates of a target, interleaved, and the change of the output."""
    output_change = _measure_change(target)
    rows = []
    for step in measure(target, 1 if machine.tiny else rounds, primed=True):
        row = {
            "candidate": LABELS[step.name],
            "ms": round(step.seconds * 1000, 2),
            "ratio": step.ratio,
            "within": step.within,
            "peak_gib": step.memory,
        }
        if step.name == "pulid":
            row["output_change"] = output_change
        rows.append(row)
    return rows


def _measure_change(target: SpeedTarget) -> float:
    """Return how much an identity changes the output, as evidence that it has an effect."""
    output = target.step()
    target.step()  # FLUX alternates between two timesteps
    with target.use_identity():
        return relative_difference(output, target.step())


# -- compiled --


def compile_and_measure_flux(recorder: Recorder, machine: Machine) -> None:
    """Measure the transformer with compiled blocks; the identity is added between them."""
    target = machine.build_flux()
    recorder.part.settings |= {"compiled": "transformer.compile_repeated_blocks()"}

    def run() -> list[Figures]:
        target.transformer.compile_repeated_blocks(backend=machine.compile_backend)
        return _measure_compiled(target, machine)

    try:
        recorder.attempt("one call", run)
    finally:
        torch.compiler.reset()


def compile_and_measure_sdxl(recorder: Recorder, machine: Machine) -> None:
    """Measure the U-Net with compiled parts of its blocks, then compiled as a whole."""
    recorder.part.settings |= {
        "blocks": "self-attention and feed-forward layers of all transformer blocks",
        "whole": "unet.compile() with skip_nnmodule_hook_guards = False, which an identity needs",
    }
    base = machine.build_sdxl()
    target = SDXLTarget(base, machine.pixels)

    def run_blocks() -> list[Figures]:
        with compile_blocks(target, machine.compile_backend):
            return _measure_compiled(target, machine)

    recorder.attempt("blocks", run_blocks, 30)
    try:
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            base.unet.compile(backend=machine.compile_backend)
            recorder.attempt("whole, base", lambda: _compile_and_time(target.step, machine), 45)
            recorder.attempt(
                "whole, with identity", lambda: _compile_and_time_identity(target, machine), 60
            )
    finally:
        torch.compiler.reset()


@torch.no_grad()
def _measure_compiled(target: SpeedTarget, machine: Machine) -> list[Figures]:
    """Measure base and identity, interleaved, after the calls that compile."""
    device = machine.device

    def run_base() -> float:
        return timed(target.step, device)

    def run_identity() -> float:
        with target.use_identity():
            target.step()  # expands the identity's keys and values
            return timed(target.step, device)

    def compile_identity() -> None:
        with target.use_identity():
            target.step()

    compile_seconds = {
        "base": timed(target.step, device),
        "pulid": timed(compile_identity, device),
    }
    output_change = _measure_change(target)
    reset_peak_memory(device)
    seconds = interleave(
        {"base": run_base, "pulid": run_identity}, 1 if machine.tiny else FLUX_ROUNDS
    )
    peak_gib = peak_memory(device)
    times = medians(seconds)
    ratio = ratios(seconds)
    rows: list[Figures] = [
        {
            "candidate": LABELS[name],
            "ms": round(times[name] * 1000, 2),
            "ratio": round(ratio[name], 4),
            "peak_gib": peak_gib,
            "compile_s": round(compile_seconds[name], 1),
        }
        for name in seconds
    ]
    rows[1]["output_change"] = output_change
    return rows


@torch.no_grad()
def _compile_and_time(step: Callable[[], object], machine: Machine) -> Figures:
    """Run three calls, which compile, and measure the median of the following calls."""
    device = machine.device
    compile_seconds = sum(timed(step, device) for _ in range(3))
    reset_peak_memory(device)
    seconds = [timed(step, device) for _ in range(1 if machine.tiny else SDXL_ROUNDS)]
    return {
        "ms": round(median(seconds) * 1000, 2),
        "peak_gib": peak_memory(device),
        "compile_s": round(compile_seconds, 1),
    }


@torch.no_grad()
def _compile_and_time_identity(target: SpeedTarget, machine: Machine) -> Figures:
    """Measure a compiled step with an identity and how much it changes the output.

    All calls are in one `use_identity` context, because each context is compiled separately.
    """
    output = target.step()
    with target.use_identity():
        row = _compile_and_time(target.step, machine)
        row["output_change"] = relative_difference(output, target.step())
    return row


# -- memory levels of FLUX --


def measure_memory_levels(recorder: Recorder, machine: Machine) -> None:
    """Measure peak memory and time of each phase of a generation, without the face models."""
    recorder.part.settings |= {
        "pixels": machine.pixels,
        "text tokens": 512,
        "16gb": "not measured separately: 24gb with the tiled decoding of 12gb",
        "predicted_gib": "by `memory_prediction.predict_memory`, without the face models",
        "steps": "ms is the median of steps 2 and 3; first_s is step 1, including loading",
    }
    for level, needs_s in (("full", 8), ("24gb", 20), ("12gb", 35)):
        run = partial(_measure_level, level, machine)
        recorder.attempt(level, run, 0 if machine.tiny else needs_s)
    if not machine.tiny:
        recorder.attempt("predicted", _predict_memory, 10)


@torch.no_grad()
def _measure_level(level: str, machine: Machine) -> list[Figures]:
    """Measure encoding of the prompt, denoising steps and decoding at a memory level."""
    device = machine.device
    target = machine.build_flux(text_tokens=512)
    with default_dtype(machine.dtype), device:
        parts = _build_encoders_and_vae(machine.tiny)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        tokenizer=None,
        tokenizer_2=None,
        transformer=target.transformer,
        **parts,
    )
    placing_seconds = timed(lambda: place_pipeline(pipe, FLUX_LEVELS[level], device), device)
    machine.release()

    phases = {
        "text": partial(_time_encoding, pipe, target),
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
    rows[0]["placing_s"] = round(placing_seconds, 1)
    return rows


def _predict_memory() -> list[Figures]:
    """Return the prediction for each level and phase, without the face models."""
    rows = []
    for level in ("full", "24gb", "12gb"):
        for use in predict_memory(level, 1024, 1024):
            size = use.total - use.parts["faces"]
            rows.append({"phase": f"{level}: {use.phase}", "predicted_gib": round(size / 2**30, 2)})
    return rows


def _time_encoding(pipe: Any, target: FluxTarget) -> list[float]:
    """Return the seconds of two calls of both text encoders."""
    tokens = target.call["encoder_hidden_states"].shape[1]
    t5_ids = torch.ones(1, tokens, dtype=torch.long, device=target.device)
    clip_ids = t5_ids[:, : pipe.text_encoder.config.max_position_embeddings]

    def encode() -> None:
        pipe.text_encoder(clip_ids)
        pipe.text_encoder_2(t5_ids)

    return [timed(encode, target.device) for _ in range(2)]


def _time_steps(target: FluxTarget) -> list[float]:
    """Return the seconds of three steps with an identity."""
    with target.use_identity():
        return [timed(target.step, target.device) for _ in range(3)]


def _time_decoding(pipe: Any, machine: Machine) -> list[float]:
    """Return the seconds of two calls of the decoder."""
    side = machine.pixels // pipe.vae_scale_factor
    shape = (1, pipe.vae.config.latent_channels, side, side)
    latents = torch.randn(shape, device=machine.device, dtype=machine.dtype)

    def decode() -> None:
        pipe.vae.decode(latents, return_dict=False)

    return [timed(decode, machine.device) for _ in range(2)]


def _build_encoders_and_vae(tiny: bool) -> dict[str, Any]:
    """Build FLUX.1's text encoders and autoencoder at their published sizes, or tiny ones."""
    if tiny:
        clip = CLIPTextConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
        t5 = T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
        vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    else:
        clip = CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
        t5 = T5Config(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=1024,
        )
    parts = {
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
        "vae": vae,
    }
    for part in parts.values():
        part.requires_grad_(False).eval()
    return parts
