"""What a training of PuLID needs at full size, predicted from shapes: memory and time."""

from __future__ import annotations

from dataclasses import dataclass

from openpulid.errors import OptionError
from openpulid.training.pulid.plan_bases import BASES
from openpulid.training.pulid.plan_costs import Costs, measure_costs
from openpulid.training.pulid.recipe import Recipe

GB = 10**9
ADAPTER_COPIES = {"adamw": 5, "muon": 4}
"""Copies of the adapter in float32: weights, gradients, their average (EMA), and one or two moments
of the optimizer."""

H100_FLOPS = 989e12
"""Dense bfloat16 products and sums per second of an H100 or H200 (NVIDIA's data sheet)."""

UTILIZATION = 0.4
"""Share of them that a training step reaches, an assumption. The eager transformer reached 0.42 in
inference on an H200 (benchmarks/gpu-h200.md)."""


@dataclass(frozen=True)
class Setup:
    """GPUs of a training.

    Attributes:
        name: as a table shows it.
        gpus: number of GPUs.
        is_sharded: whether each keeps only its share of the frozen networks.
    """

    name: str
    gpus: int
    is_sharded: bool = False


SETUPS = (
    Setup("1 GPU", 1),
    Setup("8 GPUs", 8),
    Setup("8 GPUs with --shard", 8, is_sharded=True),
)


@dataclass(frozen=True)
class Plan:
    """A prediction for one setup.

    Attributes:
        setup: the GPUs.
        accumulate: micro-batches per step and GPU.
        images: images of a micro-batch in the diffusion branch.
        few_step_images: images of a micro-batch in a rollout.
        memory: part -> bytes on each GPU at the peak.
        flops: of a step, over all GPUs.
    """

    setup: Setup
    accumulate: int
    images: int
    few_step_images: int
    memory: dict[str, int]
    flops: float

    @property
    def peak(self) -> int:
        """Bytes on each GPU at the peak."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Seconds per step on H100 GPUs."""
        return self.flops / self.setup.gpus / (H100_FLOPS * UTILIZATION)


def plan_training(
    recipe: Recipe, memory_limit: int = 80 * GB, costs: Costs | None = None
) -> list[Plan]:
    """Predict memory and time of a recipe on one GPU, eight, and eight with sharding.

    A recipe that accumulates keeps its micro-batches; another one gets the largest that fit. GPUs
    that cannot share the recipe's batches evenly are left out.

    Args:
        recipe: of SDXL, FLUX.1 or a relative, with gradient checkpointing.
        memory_limit: bytes of a GPU.
        costs: of one image; by default they are measured.

    Raises:
        OptionError: the recipe is for the miniature, or has no gradient checkpointing.
    """
    if recipe.base not in BASES or not recipe.gradient_checkpointing:
        raise OptionError(
            "a plan is made for a base of full size with gradient checkpointing, and not for "
            f"{recipe.name}."
        )
    costs = costs or measure_costs(recipe)
    plans = []
    for setup in SETUPS:
        candidates = [
            _plan(recipe, setup, costs, accumulate)
            for accumulate in _find_accumulations(recipe, setup)
        ]
        if not candidates:
            continue
        fitting = [plan for plan in candidates if plan.peak <= memory_limit]
        plans.append(fitting[0] if fitting else candidates[-1])
    return plans


def _find_accumulations(recipe: Recipe, setup: Setup) -> list[int]:
    """List the numbers of micro-batches by which the recipe's batches can be divided."""
    largest = recipe.batch // setup.gpus
    options = range(1, largest + 1) if recipe.accumulate == 1 else [recipe.accumulate]
    batches = (recipe.batch, recipe.few_step_batch)
    return [n for n in options if all(batch % (n * setup.gpus) == 0 for batch in batches)]


def _plan(recipe: Recipe, setup: Setup, costs: Costs, accumulate: int) -> Plan:
    parts = setup.gpus * accumulate
    images = recipe.batch // parts
    few_step_images = recipe.few_step_batch // parts
    has_rollout = recipe.id_loss == "accurate" or recipe.has_alignment
    k = recipe.grad_steps

    # bytes of each pass; the largest is the peak
    branch = costs.block_inputs + costs.block + costs.projections
    passes = {"diffusion branch": images * branch}
    if recipe.id_loss == "naive":
        passes["diffusion branch"] += few_step_images * costs.decoder
    # a rollout keeps the inputs of blocks, or of calls, which are small
    kept, again = (0, costs.call)
    if costs.checkpoints_blocks:
        kept, again = (costs.block_inputs, costs.block)
    if recipe.id_loss == "accurate":
        per_image = k * kept + costs.projections + max(again, costs.decoder)
        passes["ID loss"] = few_step_images * per_image
    if recipe.has_alignment:
        per_image = k * (kept + costs.alignment) + costs.projections + again
        passes["alignment"] = few_step_images * per_image
    largest = max(passes, key=lambda name: passes[name])

    networks = costs.weights["network"] * (2 if has_rollout else 1)
    if setup.is_sharded:
        networks = networks // setup.gpus + 2 * costs.largest_block
    memory = {
        "networks": networks,
        "text encoders": costs.weights["text"],
        "autoencoder": costs.weights["vae"],
        "face models": costs.weights["faces"],
        "adapter and optimizer": 4 * costs.adapter * ADAPTER_COPIES[recipe.optimizer],
        largest: passes[largest],
    }

    # a step of a rollout without gradient is one call; with it, three: forward, again, backward
    rollout_calls = recipe.rollout_steps - k + 3 * k
    calls = 3 * recipe.batch
    decodes = 0
    if recipe.id_loss == "accurate":
        calls += recipe.few_step_batch * rollout_calls
    if recipe.id_loss != "none":
        decodes = 3 * recipe.few_step_batch
    if recipe.has_alignment:
        calls += recipe.few_step_batch * (recipe.rollout_steps + rollout_calls)
    flops = calls * costs.call_flops + decodes * costs.decode_flops
    return Plan(setup, accumulate, images, few_step_images, memory, flops)
