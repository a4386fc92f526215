"""Inference parts of the GPU report: steps of SDXL and FLUX, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

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
from openpulid.bench.perf.timing import interleave, medians, ratios, timed
from openpulid.device import peak_memory, reset_peak_memory

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
