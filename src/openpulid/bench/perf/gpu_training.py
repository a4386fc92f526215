"""Parts of the GPU report that train: PuLID's stage 3 on SDXL, the miniature, and an adapter on FLUX."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from openpulid.bench.perf.gpu_machine import Machine
from openpulid.bench.perf.gpu_report import Recorder
from openpulid.bench.perf.inference import FluxTarget
from openpulid.bench.perf.timing import peak, reset_peak, timed
from openpulid.bench.perf.training import RandomSDXL, random_task, train_step
from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.training.muon import Muon
from openpulid.training.precision import autocast, fp32_attention
from openpulid.training.pulid.recipes import Recipe, find_recipe
from openpulid.training.pulid.task import Batch, PuLIDTask
from openpulid.training.rng import StepRNG

Figures = dict[str, Any]

GPUS = 8
"""The paper's: a recipe's batches are those of all of them."""

CHECKPOINTS = {
    "none": (False, False),
    "U-Net blocks": (False, True),
    "rollout steps": (True, False),
    "both": (True, True),  # what the recipe does
}
"""What is recomputed in the backward pass: (steps of the rollout, blocks of the U-Net)."""

STAGE3 = (
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
"""Rows of stage 3, (k, checkpointing), in order of worth."""


class FixedBatch:
    """A source of one batch, on the device: drawing full-size noise on the CPU would be a tenth of a step."""

    def __init__(self, batch: Batch) -> None:
        self.fixed = batch

    def batch(self, draw: StepRNG) -> Batch:
        return self.fixed


# -- stage 3 on SDXL --


def sdxl_stage3(run: Recorder, machine: Machine) -> None:
    """Whole training steps of `sdxl_stage3` with one GPU's share of the recipe's batches."""
    recipe = find_recipe("sdxl_stage3")
    recipe = replace(recipe, batch=recipe.batch // GPUS, fast_batch=recipe.fast_batch // GPUS)
    if machine.tiny:
        recipe = replace(recipe, base="mini", encoder_width=16, batch=2, pixels=16)
    run.part.settings |= {
        "batch": f"{recipe.batch} in the diffusion branch, {recipe.fast_batch} in each rollout: "
        f"the recipe's batches over {GPUS} GPUs",
        "pixels": recipe.pixels,
        "precision": "base in bf16, adapter and AdamW in float32, bf16 autocast",
        "not included": "reading data, text encoders, the average of the weights (1 copy more)",
        "recompute": "'both' is what the recipe does today",
    }
    base = machine.sdxl()
    task, optimizer = _task(recipe, base)
    plain: dict[int, float] = {}
    for k, name in STAGE3[: 3 if machine.tiny else None]:
        run.attempt(
            f"k = {k}, recompute {name}",
            partial(_stage3_row, task, optimizer, machine, k, name, plain),
            0 if machine.tiny else 8,
        )


def _task(recipe: Recipe, base: RandomSDXL) -> tuple[PuLIDTask, torch.optim.Optimizer]:
    task = random_task(recipe, base)
    task.data = FixedBatch(task.data.batch(StepRNG(0, 0)).to(base.device))
    task.adapter.train()
    fused = base.device.type != "cpu"
    return task, torch.optim.AdamW(task.adapter.parameters(), lr=recipe.lr, fused=fused)


def _stage3_row(
    task: PuLIDTask,
    optimizer: torch.optim.Optimizer,
    machine: Machine,
    k: int,
    name: str,
    plain: dict[int, float],
) -> Figures:
    rollout, blocks = CHECKPOINTS[name]
    unet = task.base.pipe.unet
    task.walk = replace(task.walk, last=k, checkpoint=rollout)
    unet.enable_gradient_checkpointing() if blocks else unet.disable_gradient_checkpointing()
    count = 1 if machine.tiny else 3 if k == 4 else 2
    seconds = _timed_steps(partial(train_step, task, optimizer), machine, count)
    if name == "none":
        plain[k] = seconds
    row = {"k": k, "recompute": name, "s": round(seconds, 3), **_memory(machine)}
    if k in plain:
        row["ratio"] = round(seconds / plain[k], 3)
    return row


def _timed_steps(step: Callable[[], object], machine: Machine, count: int) -> float:
    """Median seconds of `count` steps after one that does not count; the peaks are theirs."""
    step()
    machine.release()
    reset_peak(machine.device)
    return median(timed(step, machine.device) for _ in range(count))


def _memory(machine: Machine) -> Figures:
    return {"peak_gib": peak(machine.device), "reserved_gib": machine.reserved_gib()}


# -- the miniature --

TEXT_TOKENS = 48
"""The longest prompt of the miniature."""


def miniature(run: Recorder, machine: Machine) -> None:
    """Training images per second of the miniature: its adapter's stages, and its U-Net, eager."""
    run.part.settings |= {
        "stages": "mini_stage1 and mini_stage3 with the recipes' batches; images are those of the "
        "diffusion branch",
        **_unet_settings(),
    }
    for name in ("mini_stage1", "mini_stage3"):
        run.attempt(name, partial(_mini_stage, name, machine))
    base, unet = _mini_unet(machine)
    batches = (2,) if machine.tiny else (64, 256, 1024)
    for kind, optimizer in (("adamw", _adamw), ("muon", _muon)):
        for batch in batches:
            step = _UNetStep(base, unet, optimizer(unet), batch)
            run.attempt(f"U-Net, eager, {kind}, batch {batch}", partial(_speed, step, machine))


def compiled_miniature(run: Recorder, machine: Machine) -> None:
    """Training images per second of the miniature's U-Net, compiled."""
    run.part.settings |= _unet_settings()
    base, unet = _mini_unet(machine)
    network: Any = torch.compile(unet, backend=machine.backend)
    batch = 2 if machine.tiny else 1024
    try:
        for kind, optimizer, needs in (("adamw", _adamw, 30), ("muon", _muon, 5)):
            step = _UNetStep(base, network, optimizer(unet), batch)
            run.attempt(
                f"U-Net, compiled, {kind}, batch {batch}",
                partial(_speed, step, machine),
                0 if machine.tiny else needs,
            )
    finally:
        torch.compiler.reset()


def _unet_settings() -> dict[str, str]:
    return {
        "U-Net": "float32 under bf16 autocast, channels_last, 12 x 12 latents, "
        f"{TEXT_TOKENS} text tokens; text encoders and data not included"
    }


def _mini_unet(machine: Machine) -> tuple[RandomSDXL, nn.Module]:
    base = machine.mini()
    unet = base.unet.requires_grad_(True).train()
    return base, unet.to(memory_format=torch.channels_last)


def _muon(unet: nn.Module) -> torch.optim.Optimizer:
    return Muon(unet.parameters(), lr=3e-3)


def _adamw(unet: nn.Module) -> torch.optim.Optimizer:
    fused = next(unet.parameters()).device.type != "cpu"
    return torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=fused)


class _UNetStep:
    """A training step of the base: noise in, mean squared error, update."""

    def __init__(
        self,
        base: RandomSDXL,
        network: Any,
        optimizer: torch.optim.Optimizer,
        batch: int,
    ) -> None:
        self.device, self.batch = base.device, batch
        self.network, self.optimizer = network, optimizer
        text = base.encode_text(["portrait"] * batch)
        self.text = text.embeds[:, :TEXT_TOKENS].contiguous()
        self.added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
        shape = (batch, *base.shape())
        self.x = torch.randn(shape, device=base.device).contiguous(
            memory_format=torch.channels_last
        )
        self.target = torch.randn(shape, device=base.device)
        self.t = torch.arange(batch, device=base.device) % 1000

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            output = self.network(
                self.x,
                self.t,
                encoder_hidden_states=self.text,
                added_cond_kwargs=self.added,
                return_dict=False,
            )[0]
            loss = mse_loss(output.float(), self.target)
        with fp32_attention(self.device):
            loss.backward()
        self.optimizer.step()


def _speed(step: Any, machine: Machine) -> Figures:
    """Images per second over several steps at a time."""
    first = timed(step, machine.device)
    many = 1 if machine.tiny else 10

    def several() -> None:
        for _ in range(many):
            step()

    seconds = _timed_steps(several, machine, 1 if machine.tiny else 3) / many
    return {
        "images_per_s": round(step.batch / seconds, 1),
        "ms": round(seconds * 1000, 2),
        "peak_gib": peak(machine.device),
        "first_s": round(first, 1),
    }


class _TaskStep:
    """A training step of a task, counted in images of its diffusion branch."""

    def __init__(self, task: PuLIDTask, optimizer: torch.optim.Optimizer) -> None:
        self.task, self.optimizer, self.batch = task, optimizer, task.recipe.batch

    def __call__(self) -> None:
        train_step(self.task, self.optimizer)


def _mini_stage(name: str, machine: Machine) -> Figures:
    recipe = find_recipe(name)
    if machine.tiny:
        recipe = replace(recipe, batch=2, fast_batch=recipe.fast_batch and 1, encoder_width=16)
    task, _ = _task(recipe, machine.mini())
    optimizer = Muon(task.adapter.train().parameters(), recipe.lr, recipe.weight_decay)
    return {"batch": recipe.batch, **_speed(_TaskStep(task, optimizer), machine)}


# -- an adapter on FLUX --


class _FluxStep:
    """A flow-matching step: only the adapter trains, the transformer's blocks are recomputed."""

    def __init__(self, target: FluxTarget, machine: Machine) -> None:
        self.target, self.device = target, machine.device
        sizes: dict[str, Any] = {}
        if machine.tiny:
            sizes = {"dim": 16, "depth": 5, "dim_head": 8, "heads": 2, "hidden_dim": 16}
        target.adapter.detach()
        with machine.device:
            self.adapter = PuLIDFlux.for_transformer(target.transformer, IDFormer(**sizes))
            for layer in self.adapter.pulid_ca:
                nn.init.normal_(layer.to_out.weight, std=0.02)  # type: ignore[union-attr,arg-type]
            config = self.adapter.encoder.config
            self.id_cond = torch.randn(1, config["width"])
            self.hidden = [torch.randn(1, 577, config["vit_dim"]) for _ in range(5)]
            self.clean = torch.randn(target.call["hidden_states"].shape)
        self.adapter.train().attach(target.transformer)
        fused = machine.device.type != "cpu"
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-4, fused=fused)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        noise = torch.randn_like(self.clean)
        t = torch.rand(len(noise), device=self.device)
        with ExitStack() as stack:
            with autocast(self.device):
                # open until backward is done: recomputed blocks need the identity, too
                stack.enter_context(self._shown())
                loss = self._loss(noise, t)
            with fp32_attention(self.device):
                loss.backward()
        nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
        self.optimizer.step()

    def _shown(self) -> Any:
        return self.adapter.use_tokens(self.adapter.encode(self.id_cond, self.hidden))

    def _loss(self, noise: Tensor, t: Tensor) -> Tensor:
        """Rectified flow: x_t = (1 - t) x_0 + t noise, velocity noise - x_0."""
        transformer, dtype = self.target.transformer, self.target.tokens.dtype
        mixed_in = torch.lerp(self.clean, noise, t[:, None, None]).to(dtype)
        call = self.target.call | {"hidden_states": mixed_in, "timestep": t.to(dtype)}
        velocity = transformer(**call, return_dict=False)[0]
        return mse_loss(velocity.float(), noise - self.clean)


def flux_stage1(run: Recorder, machine: Machine) -> None:
    """A training step of PuLID on FLUX as stage 1 would make it; the package has no such recipe yet."""
    target = machine.flux(text_tokens=512)
    run.part.settings |= {
        "stands for": "flux_stage1, which is not written yet",
        "pixels": machine.pixels,
        "batch": 1,
        "text tokens": target.call["encoder_hidden_states"].shape[1],
        "precision": "transformer in bf16, adapter and AdamW in float32, bf16 autocast",
    }
    step = _FluxStep(target, machine)
    transformer = target.transformer
    transformer.enable_gradient_checkpointing()
    run.attempt("recompute blocks", partial(_flux_row, step, machine))
    transformer.disable_gradient_checkpointing()
    run.attempt("recompute nothing", partial(_flux_row, step, machine))


def _flux_row(step: _FluxStep, machine: Machine) -> Figures:
    seconds = _timed_steps(step, machine, 1 if machine.tiny else 3)
    return {"s": round(seconds, 3), **_memory(machine)}
