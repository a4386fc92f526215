"""Length, learning rate and optimizer of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerKind = Literal["adamw", "muon"]


@dataclass(frozen=True)
class TrainerConfig:
    """Everything the trainer needs to know of a run. The task owns the batch size."""

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
