"""Length, learning rate and optimizer of a training run; its speed and its time budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from statistics import fmean, median
from typing import Literal, get_args

from openpulid.errors import OptionError
from openpulid.training.limits import COUNT, FRACTION, INDEX, Limit, check_limits

OptimizerKind = Literal["adamw", "muon"]

LIMITS = {
    "steps": COUNT,
    "lr": Limit(),
    "warmup": INDEX,
    "decay": FRACTION,
    "weight_decay": Limit(),
    "ema": FRACTION,
    "max_grad_norm": Limit(),
    "accumulate": COUNT,
    "seed": INDEX,
    "validate_every": COUNT,
    "log_every": COUNT,
    "save_minutes": Limit(),
}


@dataclass(frozen=True)
class TrainerConfig:
    """Everything the trainer needs to know of a run. The task owns the batch size.

    Attributes:
        lr_scales: name of a module of the task -> factor of its learning rate; 1 for all others.
        inputs: option -> fingerprint of the weights it names, with which a run must be continued.

    Raises:
        OptionError: a number is out of its limits, or there is no such optimizer.
    """

    steps: int
    lr: float
    name: str = ""  # of the recipe; a run directory belongs to one recipe
    optimizer: OptimizerKind = "adamw"
    warmup: int = 200  # steps of linear warmup
    decay: float = (
        0.2  # final fraction of the steps with linear decay to zero (warmup-stable-decay)
    )
    weight_decay: float = 0.01  # on matrices and kernels, not on biases and norms
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.999
    max_grad_norm: float = 1.0
    accumulate: int = 1  # micro-batches per step and process, computed in sequence to save memory
    seed: int = 0
    validate_every: int = 500
    log_every: int = 20
    save_minutes: float = 3.0
    bf16: bool = True  # losses and validation under bfloat16 autocast
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_limits(self, LIMITS)
        if self.optimizer not in get_args(OptimizerKind):
            names = " or ".join(get_args(OptimizerKind))
            raise OptionError(f"optimizer must be {names}, got {self.optimizer!r}.")

    def lr_factor(self, step: int, total: int) -> float:
        """Return the factor of the learning rate at `step` (from 0) of `total`."""
        decay_steps = max(1.0, self.decay * total)
        return min(1.0, (step + 1) / max(1, self.warmup), (total - step) / decay_steps)

    def is_decaying(self, step: int, total: int) -> bool:
        """Return whether the learning rate decays at `step` (from 0) of `total`."""
        return step >= total * (1.0 - self.decay)

    def ends_plateau(self, step: int, total: int) -> bool:
        """Return whether the decay begins with the next step: the last moment to change `total`."""
        return self.is_decaying(step + 1, total) and not self.is_decaying(step, total)


WARMUP_STEPS = 10  # not measured: compilers, caches and allocators distort them
MIN_MEASURED_STEPS = 20  # fewest steps for an estimate
MAX_SLOWDOWN = 5.0  # steps that take longer than so many medians are not measured: they compile


class StepTimer:
    """Measures the durations of a step, a validation and a checkpoint.

    Args:
        step: number of steps finished when this process started.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.seconds = 0.0
        self.validation_seconds = 0.0  # duration of the last validation
        self.save_seconds = 0.0  # duration of the last checkpoint
        self.first_estimate_step = step + WARMUP_STEPS + MIN_MEASURED_STEPS
        self._start_step = step + WARMUP_STEPS
        self._durations: list[float] = []
        self._last_report: tuple[int, float] | None = None

    def update(self, step: int, seconds: float) -> None:
        """Record the time after a step.

        Args:
            step: number of finished steps.
            seconds: training time of the run.
        """
        if step > self._start_step:
            self._durations.append(seconds - self.seconds)
        self.step = step
        self.seconds = seconds
        if self._last_report is None:
            self._last_report = step, seconds

    def exclude_validation(self, seconds: float) -> None:
        """Remove a validation of this duration from the measured step time."""
        self.validation_seconds = seconds
        self._exclude(seconds)

    def exclude_save(self, seconds: float) -> None:
        """Remove a checkpoint of this duration from the measured step time."""
        self.save_seconds = seconds
        self._exclude(seconds)

    def _exclude(self, seconds: float) -> None:
        self.seconds += seconds
        if self._last_report is not None:
            step, reported_at = self._last_report
            self._last_report = step, reported_at + seconds

    @property
    def is_first_estimate(self) -> bool:
        """Whether the first estimate is due at this step."""
        return self.step == self.first_estimate_step

    @property
    def num_measured_steps(self) -> int:
        """Number of steps since the measurement started."""
        return len(self._durations)

    def steps_within(self, seconds: float, config: TrainerConfig) -> int:
        """Estimate how many steps fit into the remaining seconds.

        A validation runs after every `validate_every` steps and a checkpoint is saved after every
        `save_minutes` minutes. Both also happen at the end.
        """
        limit = MAX_SLOWDOWN * median(self._durations)
        step_seconds = fmean(duration for duration in self._durations if duration <= limit)
        step_seconds = max(1e-6, step_seconds) + self.validation_seconds / config.validate_every
        save_interval = max(config.save_minutes * 60, self.save_seconds + step_seconds)
        save_share = self.save_seconds / save_interval
        seconds -= self.validation_seconds + self.save_seconds
        return max(1, ceil(seconds * (1.0 - save_share) / step_seconds))

    def restart(self) -> None:
        """Start a new measurement, because the load of the machine changes over time."""
        self._durations = []

    def steps_per_second(self) -> float:
        """Return the speed since the last call."""
        step, seconds = self._last_report or (self.step, self.seconds)
        self._last_report = self.step, self.seconds
        if self.seconds <= seconds:
            return 0.0
        return (self.step - step) / (self.seconds - seconds)


class TimeBudget:
    """Shortens a run so that it ends, decay included, within a number of minutes.

    Args:
        config: of the run.
        minutes: training time over all resumptions; None does not limit it.
    """

    def __init__(self, config: TrainerConfig, minutes: float | None) -> None:
        self.config = config
        self.minutes = minutes

    def is_due(self, timer: StepTimer, total: int) -> bool:
        """Return whether the number of steps should be estimated now.

        That is after the first measured steps, with every validation, and right before the decay.
        """
        if self.minutes is None:
            return False
        validates = timer.step % self.config.validate_every == 0 and timer.step < total
        return validates or timer.is_first_estimate or self.config.ends_plateau(timer.step, total)

    def estimate_total(self, timer: StepTimer, total: int) -> int:
        """Return the number of steps of the whole run that fits into the budget.

        Once the decay has begun, and before enough steps are measured, this is the current `total`.
        If it begins with the first step, the number is estimated once.
        """
        is_measured = timer.num_measured_steps >= MIN_MEASURED_STEPS
        is_fixed = self.config.is_decaying(timer.step, total)
        if self.config.decay == 1.0:
            is_fixed = not timer.is_first_estimate or total < self.config.steps
        if self.minutes is None or not is_measured or is_fixed:
            return total
        seconds_left = self.minutes * 60 - timer.seconds
        steps_left = timer.steps_within(seconds_left, self.config)
        if not timer.is_first_estimate:
            timer.restart()
        return min(self.config.steps, timer.step + steps_left)
