"""Parts of the GPU report that generate: SDXL's and FLUX's steps, eager and compiled, and FLUX's memory levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from openpulid.bench.perf.gpu_machine import Machine, difference
from openpulid.bench.perf.gpu_report import Recorder
from openpulid.bench.perf.inference import FluxTarget, SDXLTarget, SpeedTarget, measure
from openpulid.bench.perf.timing import interleave, medians, peak, ratios, reset_peak, timed, wait
from openpulid.bench.perf.training import default_dtype
from openpulid.pipelines import flux_memory

NAMES = {
    "base": "base",
    "pulid": "with identity",
    "afresh": "identity recomputed every step",
    "two passes": "identity in two calls",
}
SDXL_ROUNDS = 15
FLUX_ROUNDS = 6
Figures = dict[str, Any]


# -- eager --


def sdxl(run: Recorder, machine: Machine) -> None:
    """A step of the U-Net with and without an identity, of one image and of a guided pair."""
    run.part.settings |= {
        "pixels": machine.pixels,
        "identity": "v1.1: 32 tokens, 20 zeros, ortho_v2, scale 0.8",
        "rounds": SDXL_ROUNDS,
    }
    base = machine.sdxl()
    for guided in (False, True):
        run.attempt(
            "batch 2, guided" if guided else "batch 1",
            lambda guided=guided: _steps(  # type: ignore[misc]
                SDXLTarget(base, machine.pixels, guided=guided), machine, SDXL_ROUNDS
            ),
        )


class GuidedFlux:
    """A guided step of FLUX: a call with the prompt, then one with the negative prompt."""

    apart: Callable[[], object] | None = None

    def __init__(self, target: FluxTarget) -> None:
        self.target, self.device, self.joins = target, target.device, target.joins
        self.unconditional = torch.randn_like(target.tokens)

    def step(self) -> Tensor:
        self.target.step()
        return self.target.predict()

    def opened(self) -> AbstractContextManager[Any]:
        return self.target.adapter.use_tokens(self.target.tokens, negative=self.unconditional)


def flux(run: Recorder, machine: Machine) -> None:
    """A step of the transformer with and without an identity, of one call and of a guided pair of calls."""
    target = machine.flux()
    tokens = target.call["encoder_hidden_states"].shape[1]
    run.part.settings |= {
        "pixels": machine.pixels,
        "text tokens": tokens,
        "identity": "32 tokens after every 2nd double and every 4th single block",
        "rounds": FLUX_ROUNDS,
    }
    run.attempt("one call", lambda: _steps(target, machine, FLUX_ROUNDS))
    run.attempt("guided, two calls", lambda: _steps(GuidedFlux(target), machine, FLUX_ROUNDS))


@torch.inference_mode()
def _steps(target: SpeedTarget, machine: Machine, rounds: int) -> list[Figures]:
    """Interleaved rounds of a target's candidates; and how much the identity changes the output."""
    changed = _change(target)
    rows = []
    for step in measure(target, 1 if machine.tiny else rounds, primed=True):
        row = {
            "candidate": NAMES[step.name],
            "ms": round(step.seconds * 1000, 2),
            "ratio": step.ratio,
            "within": step.within,
            "peak_gib": step.memory,
        }
        rows.append(row | ({"output_change": changed} if step.name == "pulid" else {}))
    return rows


def _change(target: SpeedTarget) -> float:
    """How much an identity changes the output: proof that it acts."""
    plain = target.step()
    target.step()  # FLUX's times take turns
    with target.opened():
        return difference(plain, target.step())


# -- compiled --


def compiled_flux(run: Recorder, machine: Machine) -> None:
    """The transformer's repeated blocks compiled, as `in_use` asks for; the identity joins between them."""
    target = machine.flux()
    run.part.settings |= {"compiled": "transformer.compile_repeated_blocks()"}

    def measured() -> list[Figures]:
        target.transformer.compile_repeated_blocks(backend=machine.backend)
        return _compiled(target, machine)

    try:
        run.attempt("one call", measured)
    finally:
        torch.compiler.reset()


def compiled_sdxl(run: Recorder, machine: Machine) -> None:
    """The U-Net compiled: its blocks for the base alone, then as a whole without and with an identity."""
    run.part.settings |= {
        "blocks": "unet.compile_repeated_blocks(), the base alone",
        "whole": "unet.compile() with skip_nnmodule_hook_guards = False, which identity needs",
    }
    base = machine.sdxl()
    target = SDXLTarget(base, machine.pixels)
    try:
        with _blocks_compiled(base.unet, machine):
            run.attempt("blocks, base", lambda: _first_then(target.step, machine), 20)
        torch.compiler.reset()
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            base.unet.compile(backend=machine.backend)
            run.attempt("whole, base", lambda: _first_then(target.step, machine), 45)
            run.attempt("whole, with identity", lambda: _opened_once(target, machine), 60)
    finally:
        torch.compiler.reset()


@contextmanager
def _blocks_compiled(unet: Any, machine: Machine) -> Iterator[None]:
    unet.compile_repeated_blocks(backend=machine.backend)
    try:
        yield
    finally:
        for module in unet.modules():
            module._compiled_call_impl = None


@torch.no_grad()
def _compiled(target: SpeedTarget, machine: Machine) -> list[Figures]:
    """Base and identity by turns after the calls that compile."""
    device = machine.device

    def with_identity() -> float:
        with target.opened():
            target.step()
            return timed(target.step, device)

    def opened() -> None:
        with target.opened():
            target.step()

    runs = {"base": lambda: timed(target.step, device), "pulid": with_identity}
    compiling = {"base": timed(target.step, device), "pulid": timed(opened, device)}
    changed = _change(target)
    reset_peak(device)
    seconds = interleave(runs, 1 if machine.tiny else FLUX_ROUNDS)
    most, times, ratio = peak(device), medians(seconds), ratios(seconds)
    rows = [
        {
            "candidate": NAMES[name],
            "ms": round(times[name] * 1000, 2),
            "ratio": round(ratio[name], 4),
            "peak_gib": most,
            "compile_s": round(compiling[name], 1),
        }
        for name in runs
    ]
    rows[1]["output_change"] = changed
    return rows


@torch.no_grad()
def _first_then(step: Callable[[], object], machine: Machine) -> Figures:
    """A first call, which compiles, and the median of the calls after the third."""
    device = machine.device
    first = [timed(step, device) for _ in range(3)]
    reset_peak(device)
    seconds = [timed(step, device) for _ in range(1 if machine.tiny else SDXL_ROUNDS)]
    return {
        "ms": round(median(seconds) * 1000, 2),
        "peak_gib": peak(device),
        "compile_s": round(sum(first), 1),
    }


@torch.no_grad()
def _opened_once(target: SpeedTarget, machine: Machine) -> Figures:
    """All calls in one `use`: another one would be compiled again."""
    plain = target.step()
    with target.opened():
        row = _first_then(target.step, machine)
        return row | {"output_change": difference(plain, target.step())}


# -- memory levels of FLUX --


def memory_levels(run: Recorder, machine: Machine) -> None:
    """Peak and time of each phase of a generation at every memory level, the face models left out."""
    run.part.settings |= {
        "pixels": machine.pixels,
        "text tokens": 512,
        "16gb": "as 24gb, but it decodes in tiles, as 12gb does: not measured on its own",
        "predicted_gib": "of `flux_memory.predict_memory`, without the face models",
        "steps": "the median of the second and third step; first_s is the first, loading included",
    }
    for level, needs in (("full", 8), ("24gb", 20), ("12gb", 35)):
        run.attempt(level, partial(_at_level, level, machine), 0 if machine.tiny else needs)
    if not machine.tiny:
        run.attempt("predicted", _predicted, 10)


@torch.no_grad()
def _at_level(level: str, machine: Machine) -> list[Figures]:
    """Time and peak of encoding the prompt, of the steps and of decoding."""
    device = machine.device
    target = machine.flux(text_tokens=512)
    with default_dtype(machine.dtype), device:
        parts = _encoders_and_vae(machine.tiny)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        tokenizer=None,
        tokenizer_2=None,
        transformer=target.transformer,
        **parts,
    )
    placing = timed(lambda: flux_memory.place(pipe, level, device), device)
    machine.release()

    phases = {
        "text": partial(_encode, pipe, target),
        "steps": partial(_three_steps, target),
        "decode": partial(_decode, pipe, machine),
    }
    rows = []
    for name, phase in phases.items():
        wait(device)
        reset_peak(device)
        first, *rest = phase()
        rows.append(
            {
                "phase": name,
                "ms": round(median(rest) * 1000, 1),
                "first_s": round(first, 2),
                "peak_gib": peak(device),
            }
        )
    rows[0]["placing_s"] = round(placing, 1)
    return rows


def _predicted() -> list[Figures]:
    """What `flux_memory.predict_memory` expects, without the face models."""
    return [
        {
            "phase": f"{level}: {need.phase}",
            "predicted_gib": round((need.total - need.parts["faces"]) / 2**30, 2),
        }
        for level in ("full", "24gb", "12gb")
        for need in flux_memory.predict_memory(level, 1024, 1024)
    ]


def _encode(pipe: Any, target: FluxTarget) -> list[float]:
    tokens = target.call["encoder_hidden_states"].shape[1]
    ids = torch.ones(1, tokens, dtype=torch.long, device=target.device)
    short = ids[:, : min(tokens, pipe.text_encoder.config.max_position_embeddings)]

    def both() -> None:
        pipe.text_encoder(short)
        pipe.text_encoder_2(ids)

    return [timed(both, target.device) for _ in range(2)]


def _three_steps(target: FluxTarget) -> list[float]:
    with target.opened():
        return [timed(target.step, target.device) for _ in range(3)]


def _decode(pipe: Any, machine: Machine) -> list[float]:
    side = machine.pixels // pipe.vae_scale_factor
    shape = (1, pipe.vae.config.latent_channels, side, side)
    latents = torch.randn(shape, device=machine.device, dtype=machine.dtype)

    def once() -> None:
        pipe.vae.decode(latents, return_dict=False)

    return [timed(once, machine.device) for _ in range(2)]


def _encoders_and_vae(tiny: bool) -> dict[str, Any]:
    """FLUX.1's text encoders and autoencoder at their published sizes, of random weights."""
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
