"""Cost of a step of PuLID's training with random weights.

Time and memory are measured for gradients through the last k steps of the few-step rollout, with
and without gradient checkpointing, and with one rollout or two for ID loss and alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import nn

from openpulid.bench.perf.random_data import RandomPeople, random_faces
from openpulid.bench.perf.timing import interleave, medians, ratios, timed
from openpulid.device import peak_memory, reset_peak_memory
from openpulid.training import Losses, StepRNG, autocast, backward, sum_losses
from openpulid.training.pulid import ALIGN_PROMPTS, BaseModel, PuLIDTask, Recipe, build_adapter


@dataclass(frozen=True)
class Cost:
    """Cost of a training step.

    Attributes:
        grad_steps: number of rollout steps through which gradients flow.
        checkpointing: whether activations are recomputed in the backward pass.
        rollouts: with gradient: 1 if ID loss and alignment share it, 2 if each has its own.
        seconds: median of the rounds.
        ratio: to the first candidate, median of the ratios of the rounds.
        memory: peak GiB, or None. Only the figure of an accelerator is reliable, see
            `device.peak_memory`.
    """

    grad_steps: int
    checkpointing: bool
    rollouts: int
    seconds: float
    ratio: float
    memory: float | None


def random_task(recipe: Recipe, base: BaseModel, **sizes: int) -> PuLIDTask:
    """Build the training task of a recipe on a base model with random weights.

    The base is also the few-step model of the lightning branch.

    Args:
        recipe: the recipe.
        base: the base model.
        sizes: of the identity encoder, where they are not the published ones.
    """
    is_mini = recipe.base == "mini"
    if is_mini:  # its face recognition model and vision encoder are smaller
        sizes = {"width": 192, "vit_dim": 96, **sizes}
    with base.device:
        adapter = build_adapter(replace(recipe, init_from=None), base, sizes)
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
        task: the training task; one whose losses share a rollout is measured with two as well.
        grad_steps: numbers of rollout steps through which gradients flow.
        checkpointing: whether to recompute activations in the backward pass.
        rounds: number of rounds.
        on_progress: called after each step with the number of steps done and in total.
    """
    device = task.base.device
    optimizer = torch.optim.AdamW(task.adapter.parameters(), lr=1e-5)
    peaks: dict[str, float | None] = {}

    def run(name: str, grad_steps: int, checkpoint: bool, rollouts: int) -> float:
        rollout = replace(task.rollout, grad_steps=grad_steps, gradient_checkpointing=checkpoint)
        candidate = task.with_rollout(rollout)
        if rollouts == 2:
            candidate.recipe = replace(task.recipe, align_prompts=ALIGN_PROMPTS)
        reset_peak_memory(device)
        seconds = timed(lambda: train_step(candidate, optimizer), device)
        peaks[name] = peak_memory(device)
        return seconds

    rollouts = (1, 2) if task.recipe.shares_rollout else (2,)
    combinations = {str(c): c for c in product(grad_steps, checkpointing, rollouts)}
    runs = {name: partial(run, name, *combination) for name, combination in combinations.items()}
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
    for title in ("gradient steps", "checkpointing", "rollouts", "seconds", "ratio", "peak GiB"):
        table.add_column(title, justify="right")
    for cost in costs:
        table.add_row(
            str(cost.grad_steps),
            "yes" if cost.checkpointing else "no",
            str(cost.rollouts),
            f"{cost.seconds:.2f}",
            f"{cost.ratio:.2f}",
            "-" if cost.memory is None else f"{cost.memory:.2f}",
        )
    Console().print(table)
