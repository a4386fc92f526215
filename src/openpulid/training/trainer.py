"""The training loop. It knows no loss, no model and no data: those belong to a `Task`.

    result = run(task, TrainerConfig(steps=20_000, lr=3e-4), "runs/detector", minutes=20)

A run can be killed at any moment. Started again with the same arguments it continues from its last
checkpoint and gives, step for step, the losses of an undisturbed run.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.errors import OptionError, TrainingError
from openpulid.training.checkpointing import (
    CHECKPOINT,
    EMA,
    Checkpointer,
    TrainingState,
    state_buffers,
    trainable_parameters,
    write_tensors,
)
from openpulid.training.distributed import DistributedContext, catch_signals
from openpulid.training.logger import TrainingLogger
from openpulid.training.optimizer import build_optimizer, set_lr
from openpulid.training.precision import FiniteCheck, autocast, backward
from openpulid.training.rng import StepRNG, generator_for, merge_records, microbatch_rngs
from openpulid.training.schedule import StepTimer, TimeBudget, TrainerConfig

Losses = Mapping[str, Tensor]
"""Scalars by name."""

GRADIENT_NORM = "gradient_norm"
"""Norm over all gradients before it is clipped, in the records of the losses."""


class Task(Protocol):
    """What is trained, on which data, and how its quality is measured."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the modules to optimize and checkpoint, under the same keys in every run."""

    def losses(self, rng: StepRNG) -> Losses:
        """Compute the named losses of a step; their sum is minimized.

        Losses are means over the rank's part of the batch. All random numbers come from `rng`.
        """

    def validate(self) -> Mapping[str, float]:
        """Measure the task on held-out data.

        Called without gradients, with averaged weights and all modules in eval mode.
        """

    def sheet(self) -> Image.Image | None:
        """Draw sample images under the conditions of `validate`; None draws none."""


class Backward(Protocol):
    """Runs the backward pass of some losses of a step."""

    def __call__(self, losses: Losses, metrics: Losses | None = None) -> None:
        """Accumulate the gradient of the sum of `losses`; `metrics` are only logged with them."""


@runtime_checkable
class MultiPassTask(Protocol):
    """A task whose step has several backward passes, so that one graph is in memory at a time.

    The task calls `backward` itself, inside whatever context the backward pass needs.
    """

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the modules, as `Task.modules`."""

    def backward_losses(self, rng: StepRNG, backward: Backward) -> None:
        """Compute the losses of a step part by part, and pass each part to `backward`."""

    def validate(self) -> Mapping[str, float]:
        """Measure the task on held-out data, as `Task.validate`."""

    def sheet(self) -> Image.Image | None:
        """Draw sample images, as `Task.sheet`."""


@dataclass(frozen=True)
class TrainingResult:
    """Summary of a finished run, whose modules hold the averaged weights.

    Attributes:
        steps: number of steps.
        seconds: training time over all resumptions.
        losses: last logged means.
        metrics: of the last validation.
        folder: the run directory.
    """

    steps: int
    seconds: float
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    folder: Path


def run(
    task: Task | MultiPassTask,
    config: TrainerConfig,
    folder: str | PathLike[str],
    *,
    minutes: float | None = None,
    device: str | torch.device | None = None,
    is_sharded: bool = False,
) -> TrainingResult:
    """Train a task in a run directory, or continue the run in it.

    Under `accelerate launch` or `torchrun`, gradients are averaged over the processes. All
    processes need the same task.

    On SIGTERM and Ctrl-C the current step is finished and saved. Then SystemExit or
    KeyboardInterrupt is raised.

    Args:
        task: what to train.
        config: length and learning rate.
        folder: the run directory.
        minutes: time budget. The number of steps that fit is estimated from the measured speed
            (again at every validation, and before the decay begins) and stored in the checkpoint,
            so that the learning rate always decays to zero.
        device: where to move the modules; None leaves them where they are.
        is_sharded: whether the processes share frozen models, so that all of them validate.

    Raises:
        OptionError: minutes are not positive, nothing is trainable, another process trains in the
            directory, or it cannot be written.
        TrainingError: a loss is not finite (weights, random numbers and batch of that step are in
            the run directory), the directory holds another run or a damaged checkpoint, or the
            last checkpoint cannot be written.
    """
    if minutes is not None and not 0 < minutes < math.inf:
        raise OptionError(f"minutes must be a positive number, got {minutes}.")
    modules = task.modules()
    if device is not None:
        for module in modules.values():
            module.to(device)
    parameters = list(trainable_parameters(modules).values())
    if not parameters:
        raise OptionError("nothing to train: no parameter of the task requires a gradient.")
    ranks = DistributedContext(parameters[0].device)
    with ranks.lock(Path(folder)):
        trainer = Trainer(task, modules, config, Path(folder), minutes, ranks)
        trainer.validates_everywhere = is_sharded
        return trainer.fit()


class Trainer:
    """Trains one task: optimizer steps, validation, checkpoints. See `run`.

    Attributes:
        validates_everywhere: whether all processes validate, not only the first one.
    """

    validates_everywhere = False

    def __init__(
        self,
        task: Task | MultiPassTask,
        modules: Mapping[str, nn.Module],
        config: TrainerConfig,
        folder: Path,
        minutes: float | None,
        ranks: DistributedContext,
    ) -> None:
        self.task = task
        self.modules = modules
        self.config = config
        self.folder = folder
        tensors = trainable_parameters(modules)
        self.parameters = list(tensors.values())
        self.device = ranks.device
        self.ranks = ranks
        buffers = state_buffers(modules)
        self.ranks.broadcast_([*self.parameters, *buffers.values()])
        self.optimizer = build_optimizer(tensors, config)
        self.average = EMA({**tensors, **buffers}, config.ema)
        self.state = TrainingState(modules, self.optimizer, self.average)
        self.budget = TimeBudget(config, minutes)
        self.checkpointer = Checkpointer(folder / CHECKPOINT, self.state, config, minutes)

        self.progress = self.checkpointer.resume()
        if self.ranks.broadcast_int(self.progress.step) != self.progress.step:
            raise TrainingError(
                f"{folder} is at another step than the first process's run directory: start all "
                "processes with the same run directory."
            )
        self.finite = FiniteCheck(self.optimizer, self.device, self.progress.step)
        self.means = RunningMeans()
        self.logger = TrainingLogger(
            folder, self.progress.step, self.progress.total, silent=self.ranks.rank > 0
        )
        self._seconds_before = self.progress.seconds
        self._started_at = time.monotonic()
        self.checkpointer.start_interval(self.seconds)

    @property
    def seconds(self) -> float:
        """Training time in seconds, over all resumptions."""
        return self._seconds_before + time.monotonic() - self._started_at

    def fit(self) -> TrainingResult:
        """Run all remaining steps, then put the averaged weights into the modules."""
        progress = self.progress
        with self.logger, catch_signals() as signals:
            # a signal in the last step stops a run before its last validation
            is_finished = progress.step == progress.validated_step >= progress.total
            self._train(signals)
            if not is_finished:
                self._validate()
                self._save(is_last=True)
            self.average.apply()
            for module in self.modules.values():
                module.eval()
            return self._result()

    def _train(self, signals: list[int]) -> None:
        """Run steps until the planned end or a signal."""
        progress = self.progress
        config = self.config
        timer = StepTimer(progress.step)
        self._set_training_mode(True)
        while progress.step < progress.total:
            self._step()
            timer.update(progress.step, self.seconds)
            if progress.step % config.log_every == 0 or progress.step == progress.total:
                self._check_finite()
                self._log(timer)
            is_validation_due = (
                progress.step % config.validate_every == 0 and progress.step < progress.total
            )
            if self.budget.is_due(timer, progress.total):
                total = self.budget.estimate_total(timer, progress.total)
                progress.total = self.ranks.broadcast_int(total)
            if is_validation_due:
                self._validate()
                self._set_training_mode(True)
                timer.exclude_validation(self.seconds - timer.seconds)
            if self.ranks.any(bool(signals)):
                self._save(is_last=True)
                self._stop(signals[0] if signals else signal.SIGTERM)
            if self.checkpointer.is_due(self.seconds):
                self._save()
                timer.exclude_save(self.seconds - timer.seconds)

    def _step(self) -> None:
        """Run one optimizer step."""
        progress = self.progress
        set_lr(
            self.optimizer, self.config.lr * self.config.lr_factor(progress.step, progress.total)
        )
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._compute_losses(self._microbatches(progress.step), backward)
        values = self.ranks.average(torch.stack(list(losses.values())), self.parameters)
        gradient_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.finite.update(values, gradient_norm)
        if not self.finite.is_deferred:
            self._check_finite()
        self.optimizer.step()
        self.average.update(progress.step)
        progress.step += 1
        self.means.add(
            {**dict(zip(losses, values, strict=True)), GRADIENT_NORM: gradient_norm.detach()}
        )

    def _microbatches(self, step: int, record: bool = False) -> list[StepRNG]:
        """Return the random numbers of each micro-batch of a step."""
        return microbatch_rngs(
            self.config.seed,
            step,
            self.ranks.rank,
            self.ranks.world_size,
            self.config.accumulate,
            record,
        )

    def _compute_losses(
        self, rngs: list[StepRNG], backward_pass: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Compute the losses of a step and call `backward_pass` for each part of them.

        Returns:
            Losses and metrics by name: detached means over the micro-batches.
        """
        totals: dict[str, Tensor] = {}

        def collect(losses: Losses, metrics: Losses | None = None) -> None:
            backward_pass(sum_losses(losses) / len(rngs))
            for name, value in {**losses, **(metrics or {})}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().float() / len(rngs)

        for rng in rngs:
            # dropout and other users of torch's global generator also depend on the step alone
            seed = generator_for(rng.seed, rng.step, "global", rng.rank).initial_seed()
            torch.manual_seed(seed)
            with autocast(self.device, self.config.bf16):
                if isinstance(self.task, MultiPassTask):
                    self.task.backward_losses(rng, collect)
                else:
                    collect(self.task.losses(rng))
        return totals

    def _set_training_mode(self, is_training: bool) -> None:
        for module in self.modules.values():
            module.train(is_training)

    def _log(self, timer: StepTimer) -> None:
        losses = self.means.pop()
        gradient_norm = losses.pop(GRADIENT_NORM)
        self.logger.log_losses(
            self.progress.step,
            self.progress.total,
            self.seconds,
            losses,
            lr=self.optimizer.param_groups[0]["lr"],
            gradient_norm=gradient_norm,
            steps_per_second=round(timer.steps_per_second(), 3),
        )

    @torch.no_grad()
    def _validate(self) -> None:
        """Validate with averaged weights, and log the first rank's metrics."""
        self.progress.validated_step = self.progress.step
        if self.ranks.rank == 0 or self.validates_everywhere:
            self._set_training_mode(False)
            with self.average.swap_in(), autocast(self.device, self.config.bf16):
                metrics = self.task.validate()
                sheet = self.task.sheet()
        if self.ranks.rank == 0:
            self.logger.log_metrics(self.progress.step, self.seconds, metrics, sheet)
        self.ranks.barrier()

    def _save(self, *, is_last: bool = False) -> None:
        """Write a checkpoint. Only a failure of the last one ends the run."""
        self._check_finite()
        self.checkpointer.start_interval(self.seconds)
        if self.ranks.rank > 0:
            return
        self.progress.seconds = self.seconds
        try:
            self.checkpointer.save(self.progress)
        except TrainingError as error:
            if is_last:
                raise
            self.logger.print(f"{error} Training continues.")
        self.logger.write()

    def _check_finite(self) -> None:
        """Stop if a loss or gradient was not finite, with everything saved to reproduce it."""
        step = self.finite.first_bad_step()
        if step is None:
            return
        rngs = self._microbatches(step, record=True)
        with torch.no_grad():
            totals = self._compute_losses(rngs, lambda loss: None)
        losses = {name: value.item() for name, value in totals.items()}
        batch = merge_records(rngs)
        weights = self.state.weight_tensors()
        summary = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        cause = describe_cause(batch, weights)
        path = self.folder / f"not-finite-step-{step}-rank-{self.ranks.rank}.safetensors"
        tensors = {f"batch.{name}": value for name, value in batch.items()} | weights
        try:
            write_tensors(
                path, tensors, {"losses": str(losses), "step": step, "config": asdict(self.config)}
            )
            details = f"Weights, random numbers and batch are in {path}"
        except TrainingError as error:
            details = str(error).rstrip(".")
        raise TrainingError(
            f"the loss or its gradient is not finite at step {step} ({summary}): {cause}. "
            f"{details}; the last checkpoint is intact."
        )

    def _stop(self, number: int) -> None:
        """Raise the exception that belongs to a signal."""
        self.logger.print(
            f"stopped and saved at step {self.progress.step}: run the same command to continue."
        )
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _result(self) -> TrainingResult:
        losses: Mapping[str, float] = {}
        metrics: Mapping[str, float] = {}
        for record in self.logger.history:
            losses = record.get("losses", losses)
            metrics = record.get("metrics", metrics)
        return TrainingResult(self.progress.step, self.seconds, losses, metrics, self.folder)


class RunningMeans:
    """Means of named scalars since the last report, added up on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Losses) -> None:
        """Add the values of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """Return the means and start again."""
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


def describe_cause(batch: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Say what is not finite in a step, and what to do about it."""
    for tensors, advice in (
        (batch, "of the batch are not numbers, check the training data"),
        (weights, "are not numbers, start again from finite weights"),
    ):
        names = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"values in {names[0]}{more} {advice}"
    return "try a lower learning rate or bf16=False"


def sum_losses(losses: Losses) -> Tensor:
    """Add up named losses in float32."""
    return torch.stack([value.float() for value in losses.values()]).sum()
