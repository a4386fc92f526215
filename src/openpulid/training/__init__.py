"""Training: a loop that is independent of losses, models and data, and PuLID's training."""

from openpulid.training.code_revision import revision
from openpulid.training.muon import Muon
from openpulid.training.precision import autocast, backward
from openpulid.training.rng import StepRNG, generator_for
from openpulid.training.schedule import TrainerConfig
from openpulid.training.trainer import Losses, Task, TrainingResult, run, sum_losses

__all__ = [
    "Losses",
    "Muon",
    "StepRNG",
    "Task",
    "TrainerConfig",
    "TrainingResult",
    "autocast",
    "backward",
    "generator_for",
    "revision",
    "run",
    "sum_losses",
]
