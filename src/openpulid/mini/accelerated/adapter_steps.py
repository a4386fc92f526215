"""The training loop of an adapter for a given time, and its file."""

from __future__ import annotations

import math
from copy import deepcopy

from torch import Tensor

from openpulid.methods.pulid import PuLID
from openpulid.mini.accelerated.state import RunState
from openpulid.mini.accelerated.steps import Average, DeviceMuon, TimedSchedule
from openpulid.training import Losses, StepRNG, TrainingResult, autocast, backward, sum_losses
from openpulid.training.pulid import PuLIDTask, Recipe, save_adapter


def fit(task: PuLIDTask, adapter: PuLID, seconds: float, run: RunState, name: str) -> int:
    """Train an adapter in place. It ends with the average of its weights.

    Args:
        task: losses and data.
        adapter: the adapter of the task.
        seconds: duration.
        run: receives the losses.
        name: of the curve.

    Returns:
        The number of steps.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    recipe = task.recipe
    max_steps = run.sizes.max_steps
    adapter.train()
    optimizer = DeviceMuon(adapter.parameters(), weight_decay=recipe.weight_decay)
    average = Average(adapter, 0.99)
    schedule = TimedSchedule(seconds, recipe.lr, recipe.warmup, max(0.5, recipe.decay))
    log_progress = run.progress_logger(name, 100)
    step = 0
    fraction = 0.0
    while fraction < 1 and (max_steps is None or step < max_steps):
        optimizer.lr.fill_(schedule.rate(step, fraction))
        optimizer.zero_grad()
        losses = backward_losses(task, recipe, step)
        optimizer.step()
        average.update(step)
        step += 1
        if step % 10 == 0 or step == max_steps:
            values = {key: round(float(value), 5) for key, value in losses.items()}
            if not all(math.isfinite(value) for value in values.values()):
                raise FloatingPointError(f"{name}: a loss is not finite at step {step}: {values}")
            fraction = schedule.fraction
            log_progress(step, fraction, values)
    optimizer.zero_grad()
    average.apply()
    adapter.eval()
    return step


def backward_losses(task: PuLIDTask, recipe: Recipe, step: int) -> Losses:
    """Run all backward passes of a step.

    Args:
        task: the task.
        recipe: seed and precision.
        step: index of the step, from 0.

    Returns:
        Losses and metrics, detached.
    """
    values: dict[str, Tensor] = {}

    def backward_part(losses: Losses, metrics: Losses | None = None) -> None:
        backward(sum_losses(losses))
        for name, value in {**losses, **(metrics or {})}.items():
            values[name] = value.detach()

    with autocast(task.base.device, recipe.bf16):
        task.backward_losses(StepRNG(recipe.seed, step), backward_part)
    return values


def save(run: RunState, adapter: PuLID, name: str, recipe: Recipe, steps: int) -> None:
    """Save a bfloat16 copy of an adapter, and pack all adapters of the run.

    Args:
        run: the run.
        adapter: the adapter.
        name: of the stage.
        recipe: of the stage.
        steps: number of steps of the stage.
    """
    path = run.work_dir / f"pulid-{name}.safetensors"
    result = TrainingResult(steps, 0.0, {}, {}, run.work_dir)
    save_adapter(deepcopy(adapter).bfloat16(), path, recipe, result)
    files = sorted(run.work_dir.glob("pulid-*.safetensors"))
    run.out.pack("adapters", [(file, file.name) for file in files])
