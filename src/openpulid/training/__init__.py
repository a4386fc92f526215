"""Training: a loop that is independent of losses, models and data, and PuLID's training."""

from openpulid.training.muon import Muon
from openpulid.training.precision import autocast, backward
from openpulid.training.rng import StepRNG, generator_for
from openpulid.training.run_folder import ADAPTER_FILE, check_run_dir, delete_run
from openpulid.training.schedule import TrainerConfig
from openpulid.training.trainer import Losses, Task, TrainingResult, run, sum_losses

__all__ = [
    "ADAPTER_FILE",
    "Losses",
    "StepRNG",
    "Task",
    "Muon",
    "TrainerConfig",
    "TrainingResult",
    "autocast",
    "backward",
    "check_run_dir",
    "delete_run",
    "generator_for",
    "run",
    "sum_losses",
]
