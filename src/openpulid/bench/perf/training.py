"""What a step of PuLID's training costs: time and memory for gradients through the last k steps, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from openpulid.bench.perf.timing import interleave, medians, peak, ratios, reset_peak, timed
from openpulid.device import compute_dtype
from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.errors import OptionError
from openpulid.faces.align import TEMPLATE
from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.face import Face
from openpulid.faces.mini_recognition import RECOGNITION_MODELS
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.presets import MINIATURE
from openpulid.training.precision import autocast, backward
from openpulid.training.pulid.batch import Batch
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
"""The published figures of SDXL's U-Net, and below of its autoencoder."""
SDXL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}


@dataclass(frozen=True)
class Cost:
    """Of one candidate: median seconds of a step, their ratio to the first candidate's, peak memory in GiB or None.

    On a CPU the memory is the process's high-water mark, which freed but kept blocks blur: trust it on an accelerator only.
    """

    last: int
    checkpoint: bool
    seconds: float
    ratio: float
    memory: float | None


class _Parts:
    """What `SDXLModel` wants of a pipeline, without text encoders: what a step costs does not depend on them."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
        self.unet, self.vae, self.text_encoder, self.text_encoder_2 = unet, vae, None, None
        self.scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)


class RandomSDXL(SDXLModel):
    """A base of SDXL's architecture, and random sentences of 77 tokens."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
        super().__init__(_Parts(unet, vae))
        self.pooled = (
            unet.config.projection_class_embeddings_input_dim
            - 6 * unet.config.addition_time_embed_dim
        )

    def encode_text(
        self, prompts: Sequence[str], *, pixels: int | None = None, guided: bool = False
    ) -> TextConditioning:
        rows, like = len(prompts) * (1 + guided), {"device": self.device, "dtype": self.unet.dtype}
        side = float(pixels or self.unet.config.sample_size * self.pipe.vae_scale_factor)
        ids = torch.tensor([[side, side, 0, 0, side, side]], **like).expand(rows, -1)
        embeds = torch.randn(rows, 77, self.unet.config.cross_attention_dim, **like)
        return TextConditioning(embeds, torch.randn(rows, self.pooled, **like), ids)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """What a base is measured in there, as it is used: the miniature in float32, the others in half where that pays."""
    return torch.float32 if name == "mini" else compute_dtype(device)


def random_base(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> RandomSDXL:
    """ "mini" or "sdxl" at their full size with random weights, made where and as they are wanted.

    Raises:
        OptionError: another name.
    """
    if name not in ("mini", "sdxl"):
        raise OptionError(f"{name!r} cannot be made of random weights: mini or sdxl")
    with default_dtype(dtype), device:
        if name == "sdxl":
            return RandomSDXL(UNet2DConditionModel(**SDXL_UNET), AutoencoderKL(**SDXL_VAE))
        unet, vae = (
            json.loads((MINIATURE / "pipeline" / part / "config.json").read_text())
            for part in ("unet", "vae")
        )
        return RandomSDXL(
            UNet2DConditionModel.from_config(unet), PatchAutoencoderKL.from_config(vae)
        )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have this dtype: no float32 copy is ever there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class RandomPeople:
    """A `BatchSource` of noise."""

    def __init__(
        self, base: BaseModel, adapter: PuLID, size: int, tokens: int, pixels: int | None
    ) -> None:
        self.base, self.size, self.tokens, self.pixels = base, size, tokens, pixels
        config = adapter.id_adapter.config
        self.width, self.hidden = config["width"], config["vit_dim"]

    def batch(self, rng: StepRNG) -> Batch:
        latents = rng.randn((self.size, *self.base.latent_shape(self.pixels)), "latents")
        hidden = [rng.randn((self.size, self.tokens, self.hidden), f"hidden.{k}") for k in range(5)]
        pictures = rng.rand((self.size, 3, 128, 128), "pictures")
        return Batch(
            latents,
            None,
            ["portrait"] * self.size,
            rng.randn((self.size, self.width), "id"),
            hidden,
            pictures,
        )


def random_faces(device: torch.device) -> FaceEmbedder:
    """A face in the middle of every picture, and a recogniser of random weights."""

    def find(images: Tensor) -> list[Face | None]:
        side = images.shape[-1]
        box, mask = torch.tensor([0.0, 0.0, side, side]), torch.ones(1, side, side)
        return [Face(image, box, TEMPLATE * side, 1.0, mask) for image in images]

    return FaceEmbedder(find, RECOGNITION_MODELS["encoder"]().to(device))


def random_task(recipe: Recipe, base: BaseModel) -> PuLIDTask:
    """The recipe on a base of random weights, which also walks the lightning branch."""
    unet = base.pipe.unet
    encoder = {"IDEncoder": IDEncoder, "IDFormer": IDFormer}[recipe.encoder]
    sizes = {
        "context_dim" if encoder is IDEncoder else "output_dim": unet.config.cross_attention_dim
    }
    if recipe.base == "mini":  # its recogniser and tower are smaller, too
        sizes |= {"width": 192, "vit_dim": 96, "hidden_dim": recipe.encoder_width}
    adapter = PuLID.for_unet(unet, encoder(**sizes)).to(base.device, torch.float32)
    people = RandomPeople(
        base, adapter, recipe.batch, 65 if recipe.base == "mini" else 577, recipe.pixels
    )
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
    lasts: Iterable[int] = (1, 2, 3, 4),
    checkpoints: Iterable[bool] = (False, True),
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Cost]:
    """Whole steps of every candidate by turns in one process, after one of each that does not count."""
    chosen = list(checkpoints)
    candidates = [(last, again) for last in lasts for again in chosen]
    optimizer = torch.optim.AdamW(task.adapter.parameters(), lr=1e-5)
    memory: dict[str, float | None] = {}
    device = task.base.device

    def run(name: str, last: int, again: bool) -> float:
        rollout = replace(task.rollout, grad_steps=last, gradient_checkpointing=again)
        candidate = task.with_rollout(rollout)
        reset_peak(device)
        seconds = timed(lambda: _step(candidate, optimizer), device)
        memory[name] = peak(device)
        return seconds

    names = {f"{last} {again}": (last, again) for last, again in candidates}
    seconds = interleave(
        {name: partial(run, name, *c) for name, c in names.items()}, rounds, on_progress
    )
    times, ratio = medians(seconds), ratios(seconds)
    return [Cost(*names[n], round(times[n], 4), round(ratio[n], 3), memory[n]) for n in names]


def show(costs: Sequence[Cost]) -> None:
    """The table for people, on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("gradients through the last", "computed again", "seconds", "ratio", "GiB at most"):
        grid.add_column(name, justify="right")
    for c in costs:
        memory = "-" if c.memory is None else f"{c.memory:.2f}"
        grid.add_row(
            str(c.last),
            "yes" if c.checkpoint else "no",
            f"{c.seconds:.2f}",
            f"{c.ratio:.2f}",
            memory,
        )
    Console().print(grid)


def _step(task: PuLIDTask, optimizer: torch.optim.Optimizer) -> None:
    device = task.base.device
    optimizer.zero_grad(set_to_none=True)

    def backward_losses(losses: Losses, metrics: Losses | None = None) -> None:
        backward(sum_losses(losses))

    with autocast(device, task.recipe.bf16):
        task.backward_losses(StepRNG(0, 0), backward_losses)
    nn.utils.clip_grad_norm_(task.adapter.parameters(), 1.0)
    optimizer.step()
