"""Cost of a step of PuLID's training with random weights.

Time and memory are measured for gradients through the last k steps of the few-step rollout, with
and without gradient checkpointing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn

from openpulid.bench.perf.random_data import RandomPeople, random_faces
from openpulid.bench.perf.timing import interleave, medians, peak, ratios, reset_peak, timed
from openpulid.device import compute_dtype
from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.errors import OptionError
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.presets import MINIATURE
from openpulid.training.precision import autocast, backward
from openpulid.training.pulid.models import BaseModel, SDXLModel, TextConditioning
from openpulid.training.pulid.recipes import Recipe
from openpulid.training.pulid.task import PuLIDTask
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import Losses, sum_losses

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

SDXL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
"""Configuration of SDXL's autoencoder."""


@dataclass(frozen=True)
class Cost:
    """Cost of a training step.

    Attributes:
        grad_steps: number of rollout steps through which gradients flow.
        checkpointing: whether activations are recomputed in the backward pass.
        seconds: median of the rounds.
        ratio: to the first candidate, median of the ratios of the rounds.
        memory: peak GiB, or None. Only the figure of an accelerator is reliable, see `peak`.
    """

    grad_steps: int
    checkpointing: bool
    seconds: float
    ratio: float
    memory: float | None


class _PipelineParts:
    """The parts of a pipeline that `SDXLModel` uses.

    There are no text encoders: they do not affect the cost of a step.
    """

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
        self.unet = unet
        self.vae = vae
        self.text_encoder = None
        self.text_encoder_2 = None
        self.scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)


class RandomSDXL(SDXLModel):
    """A base model of SDXL's architecture with random prompt embeddings of 77 tokens."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
        super().__init__(_PipelineParts(unet, vae))
        config = unet.config
        self.pooled_width = (
            config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        )

    def encode_text(
        self, prompts: Sequence[str], *, pixels: int | None = None, guided: bool = False
    ) -> TextConditioning:
        """Return random embeddings, twice as many if guided."""
        rows = len(prompts) * (1 + guided)
        like: dict[str, Any] = {"device": self.device, "dtype": self.unet.dtype}
        side = float(pixels or self.unet.config.sample_size * self.pipe.vae_scale_factor)
        ids = torch.tensor([[side, side, 0, 0, side, side]], **like).expand(rows, -1)
        embeds = torch.randn(rows, 77, self.unet.config.cross_attention_dim, **like)
        return TextConditioning(embeds, torch.randn(rows, self.pooled_width, **like), ids)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype in which a base model is used: the miniature in float32."""
    return torch.float32 if name == "mini" else compute_dtype(device)


def random_base(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> RandomSDXL:
    """Build "mini" or "sdxl" at full size with random weights.

    Args:
        name: the base model.
        device: where it is built.
        dtype: of its weights.

    Raises:
        OptionError: an unknown name.
    """
    if name not in ("mini", "sdxl"):
        raise OptionError(f"base {name!r} is not available with random weights; use mini or sdxl.")
    with default_dtype(dtype), device:
        if name == "sdxl":
            unet = UNet2DConditionModel(**SDXL_UNET)
            vae = AutoencoderKL(**SDXL_VAE)
        else:
            unet = UNet2DConditionModel.from_config(_read_config("unet"))
            vae = PatchAutoencoderKL.from_config(_read_config("vae"))
    return RandomSDXL(unet, vae)  # not on the device: its noise schedule stays on the CPU


def _read_config(part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MINIATURE / "pipeline" / part / "config.json").read_text())
    return config


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build modules in this dtype, without an intermediate float32 copy."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def random_task(recipe: Recipe, base: BaseModel) -> PuLIDTask:
    """Build the training task of a recipe on a base model with random weights.

    The base is also the few-step model of the lightning branch.
    """
    unet = base.pipe.unet
    width = unet.config.cross_attention_dim
    is_mini = recipe.base == "mini"
    sizes: dict[str, int] = {}
    if is_mini:  # its face recognition model and vision encoder are smaller
        sizes = {"width": 192, "vit_dim": 96, "hidden_dim": recipe.encoder_width}
    with base.device:
        encoder: nn.Module
        if recipe.encoder == "IDEncoder":
            encoder = IDEncoder(context_dim=width, **sizes)
        else:
            encoder = IDFormer(output_dim=width, **sizes)
        adapter = PuLID.for_unet(unet, encoder).to(torch.float32)
    people = RandomPeople(base, adapter, recipe.batch, 65 if is_mini else 577, recipe.pixels)
    return PuLIDTask(
        recipe,
        base,
        adapter,
        people,
        few_step_models=[base],
        face_embedder=random_faces(base.device),
    )


def measure(
    task: PuLIDTask,
    grad_steps: Iterable[int] = (1, 2, 3, 4),
    checkpointing: Iterable[bool] = (False, True),
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Cost]:
    """Measure whole training steps of every combination, interleaved in one process.

    Args:
        task: the training task.
        grad_steps: numbers of rollout steps through which gradients flow.
        checkpointing: whether to recompute activations in the backward pass.
        rounds: number of rounds.
        on_progress: called after each step with the number of steps done and in total.
    """
    device = task.base.device
    optimizer = torch.optim.AdamW(task.adapter.parameters(), lr=1e-5)
    peaks: dict[str, float | None] = {}

    def run(name: str, grad_steps: int, checkpoint: bool) -> float:
        rollout = replace(task.rollout, grad_steps=grad_steps, gradient_checkpointing=checkpoint)
        candidate = task.with_rollout(rollout)
        reset_peak(device)
        seconds = timed(lambda: train_step(candidate, optimizer), device)
        peaks[name] = peak(device)
        return seconds

    combinations = {f"{k} {flag}": (k, flag) for k, flag in product(grad_steps, checkpointing)}
    runs = {name: partial(run, name, k, flag) for name, (k, flag) in combinations.items()}
    seconds = interleave(runs, rounds, on_progress)
    times = medians(seconds)
    ratio = ratios(seconds)
    return [
        Cost(*combinations[name], round(times[name], 4), round(ratio[name], 3), peaks[name])
        for name in combinations
    ]


def train_step(task: PuLIDTask, optimizer: torch.optim.Optimizer) -> None:
    """Run one whole step: every loss forward and backward, gradient clipping, update."""
    device = task.base.device
    optimizer.zero_grad(set_to_none=True)

    def backward_losses(losses: Losses, metrics: Losses | None = None) -> None:
        backward(sum_losses(losses))

    with autocast(device, task.recipe.bf16):
        task.backward_losses(StepRNG(0, 0), backward_losses)
    nn.utils.clip_grad_norm_(task.adapter.parameters(), 1.0)
    optimizer.step()


def print_costs(costs: Sequence[Cost]) -> None:
    """Print the costs as a table on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("gradient steps", "checkpointing", "seconds", "ratio", "peak GiB"):
        table.add_column(title, justify="right")
    for cost in costs:
        table.add_row(
            str(cost.grad_steps),
            "yes" if cost.checkpointing else "no",
            f"{cost.seconds:.2f}",
            f"{cost.ratio:.2f}",
            "-" if cost.memory is None else f"{cost.memory:.2f}",
        )
    Console().print(table)
