"""How long a training lasts and how fast it learns."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

OptimizerKind = Literal["adamw", "muon"]

WARM_STEPS = 10  # steps whose time says nothing: compilers, caches, allocators
MEASURED_STEPS = 20  # the fewest from which an estimate is made


@dataclass(frozen=True)
class TrainerConfig:
    """How long and how fast. The batch size is the task's."""

    steps: int
    lr: float
    name: str = ""  # of the recipe: a folder keeps to it
    optimizer: OptimizerKind = "adamw"
    warmup: int = 200  # steps of linear rise
    decay: float = 0.2  # last part of the steps: linear fall to zero ("warmup-stable-decay")
    weight_decay: float = 0.01  # on matrices and kernels only, not on biases and norms
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.999
    clip: float = 1.0  # largest gradient norm
    accumulate: int = (
        1  # parts of a step's batch that are made one after the other, for less memory
    )
    seed: int = 0
    validate_every: int = 500
    log_every: int = 20
    save_minutes: float = 3.0
    bf16: bool = True  # losses and validation under bfloat16 autocast

    def factor(self, step: int, total: int) -> float:
        """Of the learning rate, at `step` (from 0) of `total`."""
        tail = max(1.0, self.decay * total)
        return min(1.0, (step + 1) / max(1, self.warmup), (total - step) / tail)

    def in_tail(self, step: int, total: int) -> bool:
        return step >= total * (1.0 - self.decay)

    def ends_plateau(self, step: int, total: int) -> bool:
        """Whether the tail begins with the next step: the last moment to ask how many are left."""
        return self.in_tail(step + 1, total) and not self.in_tail(step, total)


class StepTimer:
    """How fast the steps of this process are, checkpoints included, and how long a validation takes."""

    def __init__(self, step: int) -> None:
        self.origin = step + WARM_STEPS, 0.0  # where measuring began: step, seconds
        self.estimate_at = step + WARM_STEPS + MEASURED_STEPS
        self.step, self.now = step, 0.0
        self.last: tuple[int, float] | None = None
        self.validation = 0.0  # seconds of the last one

    def note(self, step: int, seconds: float) -> None:
        """After every step."""
        self.step, self.now = step, seconds
        if step == self.origin[0]:
            self.origin = step, seconds
        if self.last is None:
            self.last = step, seconds

    def aside(self, seconds: float) -> None:
        """After a validation that took so long: few steps with one among them would look slow."""
        self.validation = seconds
        self.origin = self.origin[0], self.origin[1] + seconds
        if self.last is not None:
            self.last = self.last[0], self.last[1] + seconds

    @property
    def first_estimate(self) -> bool:
        return self.step == self.estimate_at

    @property
    def measured(self) -> int:
        return max(0, self.step - self.origin[0])

    def fitting(self, seconds: float, validate_every: int) -> int:
        """How many steps fit into the seconds that are left, with a validation after every so many and at the end."""
        each = (
            max(1e-6, (self.now - self.origin[1]) / self.measured)
            + self.validation / validate_every
        )
        return max(1, ceil((seconds - self.validation) / each))

    def restart(self) -> None:
        """Measuring begins anew: other programs come and go."""
        self.origin = self.step, self.now

    def speed(self) -> float:
        """Steps per second since the last call."""
        step, seconds = self.last or (self.step, self.now)
        self.last = self.step, self.now
        return (self.step - step) / (self.now - seconds) if self.now > seconds else 0.0
