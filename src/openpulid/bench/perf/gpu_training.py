"""Training parts of the GPU report: stage 3 on SDXL, the miniature, and stage 1 on FLUX."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from openpulid.bench.perf.gpu_machine import Machine
from openpulid.bench.perf.gpu_report import Recorder
from openpulid.bench.perf.timing import timed
from openpulid.bench.perf.training import random_task, train_step
from openpulid.device import peak_memory, reset_peak_memory
from openpulid.methods.pulid import PuLIDFlux
from openpulid.training import Muon, StepRNG, autocast, backward
from openpulid.training.pulid import (
    BaseModel,
    Batch,
    PuLIDTask,
    Recipe,
    SDXLModel,
    find_recipe,
)

Figures = dict[str, Any]

NUM_GPUS = 8
"""GPUs of the paper, which share a recipe's batches."""

CHECKPOINTING = {
    "none": (False, False),
    "U-Net blocks": (False, True),
    "rollout steps": (True, False),
    "both": (True, True),  # as the recipe does
}
"""What the backward pass recomputes: (steps of the rollout, blocks of the U-Net)."""

STAGE3_ROWS = (
    (4, "none"),
    (4, "U-Net blocks"),
    (4, "both"),
    (1, "none"),
    (1, "both"),
    (2, "none"),
    (3, "none"),
    (4, "rollout steps"),
    (2, "both"),
    (3, "both"),
)
"""Rows of stage 3, (k, checkpointing), the most important first."""

MAX_TEXT_TOKENS = 48
"""Length of the miniature's longest prompt."""


class FixedBatch:
    """A `BatchSource` of one batch on the device.

    Drawing full-size noise on the CPU would take a tenth of a step.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, rng: StepRNG) -> Batch:
        """Return the batch."""
        return self._batch


# -- stage 3 on SDXL --


def measure_sdxl_stage3(recorder: Recorder, machine: Machine) -> None:
    """Measure training steps of `sdxl_stage3` with one GPU's share of the recipe's batches."""
    recipe = find_recipe("sdxl_stage3")
    recipe = replace(
        recipe,
        batch=recipe.batch // NUM_GPUS,
        few_step_batch=recipe.few_step_batch // NUM_GPUS,
    )
    if machine.tiny:
        recipe = replace(recipe, base="mini", encoder_width=16, batch=2, pixels=16)
    recorder.part.settings |= {
        "batch": f"{recipe.batch} in the diffusion branch, {recipe.few_step_batch} in each "
        f"rollout: the recipe's batches divided by {NUM_GPUS} GPUs",
        "pixels": recipe.pixels,
        "precision": "base in bf16, adapter and AdamW in float32, bf16 autocast",
        "not included": "reading data, text encoders, the average of the weights (one more copy)",
        "recompute": "'both' is what the recipe does",
    }
    task = _build_task(recipe, machine.build_sdxl())
    fused = not machine.is_cpu
    optimizer = torch.optim.AdamW(task.adapter.parameters(), lr=recipe.lr, fused=fused)
    plain_seconds: dict[int, float] = {}

    def run(k: int, checkpointing: str) -> Figures:
        seconds = _time_rollout(task, optimizer, machine, k, checkpointing)
        if checkpointing == "none":
            plain_seconds[k] = seconds
        row = {"k": k, "recompute": checkpointing, "s": round(seconds, 3)}
        row |= _peak_memory(machine)
        if k in plain_seconds:
            row["ratio"] = round(seconds / plain_seconds[k], 3)
        return row

    for k, checkpointing in STAGE3_ROWS[: 3 if machine.tiny else None]:
        recorder.attempt(
            f"k = {k}, recompute {checkpointing}",
            partial(run, k, checkpointing),
            0 if machine.tiny else 8,
        )


def _build_task(recipe: Recipe, base: BaseModel, **sizes: int) -> PuLIDTask:
    """Build the task of a recipe with a fixed batch."""
    task = random_task(recipe, base, **sizes)
    task.data = FixedBatch(task.data.batch(StepRNG(0, 0)).to(base.device))
    task.adapter.train()
    return task


def _time_rollout(
    task: PuLIDTask,
    optimizer: torch.optim.Optimizer,
    machine: Machine,
    k: int,
    checkpointing: str,
) -> float:
    """Return the seconds of a training step with gradients through the last k rollout steps."""
    checkpoint_rollout, checkpoint_blocks = CHECKPOINTING[checkpointing]
    rollout = replace(task.rollout, grad_steps=k, gradient_checkpointing=checkpoint_rollout)
    unet = task.base.pipe.unet
    if checkpoint_blocks:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()
    count = 1
    if not machine.tiny:
        count = 3 if k == 4 else 2
    return _time_steps(partial(train_step, task.with_rollout(rollout), optimizer), machine, count)


def _time_steps(step: Callable[[], object], machine: Machine, count: int) -> float:
    """Return the median seconds of `count` steps, after a first step that is not measured.

    The peak memory afterwards is that of the measured steps.
    """
    step()
    machine.release()
    reset_peak_memory(machine.device)
    return median(timed(step, machine.device) for _ in range(count))


def _peak_memory(machine: Machine) -> Figures:
    return {"peak_gib": peak_memory(machine.device), "reserved_gib": machine.max_reserved_gib()}


# -- the miniature --


def measure_miniature(recorder: Recorder, machine: Machine) -> None:
    """Measure training images per second of the miniature's adapter stages and of its U-Net."""
    machine.require_miniature()
    recorder.part.settings |= {
        "stages": "mini_stage1 and mini_stage3 with the recipes' batches; counts the images of "
        "the diffusion branch",
        **_unet_settings(),
    }
    for name in ("mini_stage1", "mini_stage3"):
        recorder.attempt(name, partial(_measure_stage, name, machine))
    base, unet = _build_unet(machine)
    batches = (2,) if machine.tiny else (64, 256, 1024)
    for name, create_optimizer in (("adamw", _create_adamw), ("muon", _create_muon)):
        for batch in batches:
            step = UNetStep(base, unet, create_optimizer(unet.parameters()), batch)
            recorder.attempt(
                f"U-Net, eager, {name}, batch {batch}",
                partial(_measure_throughput, step, batch, machine),
            )


def compile_and_measure_miniature(recorder: Recorder, machine: Machine) -> None:
    """Measure training images per second of the miniature's compiled U-Net."""
    machine.require_miniature()
    recorder.part.settings |= _unet_settings()
    base, unet = _build_unet(machine)
    network: Any = torch.compile(unet, backend=machine.compile_backend)
    batch = 2 if machine.tiny else 1024
    optimizers = (("adamw", _create_adamw, 30), ("muon", _create_muon, 5))
    try:
        for name, create_optimizer, needs_s in optimizers:
            step = UNetStep(base, network, create_optimizer(unet.parameters()), batch)
            recorder.attempt(
                f"U-Net, compiled, {name}, batch {batch}",
                partial(_measure_throughput, step, batch, machine),
                0 if machine.tiny else needs_s,
            )
    finally:
        torch.compiler.reset()


def _unet_settings() -> dict[str, str]:
    return {
        "U-Net": "float32 with bf16 autocast, channels_last, 12 x 12 latents, "
        f"{MAX_TEXT_TOKENS} text tokens; without text encoders and data"
    }


def _build_unet(machine: Machine) -> tuple[SDXLModel, nn.Module]:
    """Build the miniature's base model and return it with its U-Net, ready for training."""
    base = machine.build_miniature()
    unet = base.unet.requires_grad_(True).train()
    return base, unet.to(memory_format=torch.channels_last)


def _create_muon(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return Muon(parameters, lr=3e-3)


def _create_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    fused = parameters[0].device.type != "cpu"
    return torch.optim.AdamW(parameters, lr=1e-4, fused=fused)


class UNetStep:
    """A training step of the base: mean squared error on random data, and an update.

    Args:
        base: the base model.
        network: its U-Net, or the compiled U-Net.
        optimizer: of the U-Net's parameters.
        batch: batch size.
    """

    def __init__(
        self, base: SDXLModel, network: Any, optimizer: torch.optim.Optimizer, batch: int
    ) -> None:
        self.device = base.device
        self.network = network
        self.optimizer = optimizer
        text = base.encode_text(["portrait"] * batch)
        self.text = text.embeds[:, :MAX_TEXT_TOKENS].contiguous()
        self.added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
        shape = (batch, *base.latent_shape())
        x = torch.randn(shape, device=base.device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.target = torch.randn(shape, device=base.device)
        self.t = torch.arange(batch, device=base.device) % 1000

    def __call__(self) -> None:
        """Run the step."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            output = self.network(
                self.x,
                self.t,
                encoder_hidden_states=self.text,
                added_cond_kwargs=self.added,
                return_dict=False,
            )[0]
            backward(mse_loss(output.float(), self.target))
        self.optimizer.step()


def _measure_stage(name: str, machine: Machine) -> Figures:
    """Measure the recipe `name` of the miniature."""
    recipe = find_recipe(name)
    if machine.tiny:
        few_step_batch = min(recipe.few_step_batch, 1)
        recipe = replace(recipe, batch=2, few_step_batch=few_step_batch, encoder_width=16)
    task = _build_task(recipe, machine.build_miniature())
    optimizer = Muon(task.adapter.parameters(), recipe.lr, recipe.weight_decay)
    step = partial(train_step, task, optimizer)
    return {"batch": recipe.batch, **_measure_throughput(step, recipe.batch, machine)}


def _measure_throughput(step: Callable[[], object], batch: int, machine: Machine) -> Figures:
    """Measure images per second, over ten steps at a time."""
    first_seconds = timed(step, machine.device)
    count = 1 if machine.tiny else 10

    def run_steps() -> None:
        for _ in range(count):
            step()

    seconds = _time_steps(run_steps, machine, 1 if machine.tiny else 3) / count
    return {
        "images_per_s": round(batch / seconds, 1),
        "ms": round(seconds * 1000, 2),
        "peak_gib": peak_memory(machine.device),
        "first_s": round(first_seconds, 1),
    }


# -- stage 1 on FLUX --


def measure_flux_stage1(recorder: Recorder, machine: Machine) -> None:
    """Measure training steps of `flux_stage1` with one GPU's share of the recipe's batch."""
    recipe = find_recipe("flux_stage1")
    recipe = replace(recipe, batch=recipe.batch // NUM_GPUS)
    sizes: dict[str, int] = {}
    if machine.tiny:
        recipe = replace(
            recipe, batch=2, pixels=32, encoder_width=16, attention_heads=2, attention_head_dim=8
        )
        sizes = {"dim": 16, "depth": 5, "dim_head": 8, "heads": 2, "output_dim": 16}
    assert recipe.pixels is not None
    base = machine.build_flux_model(recipe.pixels, recipe.text_tokens)
    recorder.part.settings |= {
        "batch": f"{recipe.batch}: the recipe's batch divided by {NUM_GPUS} GPUs",
        "pixels": recipe.pixels,
        "text tokens": base.max_sequence_length,
        "precision": "transformer in bf16, adapter and AdamW in float32, bf16 autocast",
        "not included": "reading data, text encoders, the average of the weights (one more copy)",
    }
    task = _build_task(recipe, base, **sizes)
    assert isinstance(task.adapter, PuLIDFlux)
    for layer in task.adapter.layers:  # untrained, they add nothing
        nn.init.normal_(layer.to_out.weight, std=0.02)
    step = partial(train_step, task, _create_adamw(task.adapter.parameters()))

    def run() -> Figures:
        seconds = _time_steps(step, machine, 1 if machine.tiny else 3)
        return {"s": round(seconds, 3), **_peak_memory(machine)}

    base.transformer.enable_gradient_checkpointing()
    recorder.attempt("recompute blocks", run)
    base.transformer.disable_gradient_checkpointing()
    recorder.attempt("recompute nothing", run)
