"""Training of PuLID: recipes, branches, losses, and the entry points."""

from openpulid.training.pulid.batch import (
    Batch,
    BatchSource,
    drop_captions,
    drop_identity,
    loss_weight_map,
    swap_identities,
)
from openpulid.training.pulid.branches import DiffusionStep, diffusion_branch
from openpulid.training.pulid.export import save_adapter
from openpulid.training.pulid.flux_model import FluxModel, FluxText
from openpulid.training.pulid.held_out import (
    HELD_OUT_BATCHES,
    HeldOutLosses,
    standard_error,
    summarize_held_out,
)
from openpulid.training.pulid.losses import DiffusionLoss
from openpulid.training.pulid.models import BaseModel, SDXLModel, TextConditioning
from openpulid.training.pulid.prompts import ALIGN_PROMPTS
from openpulid.training.pulid.recipe import DEFAULT_PIXELS, Recipe
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.pulid.task import PuLIDTask, Validation
from openpulid.training.pulid.train import (
    ADAPTER_FILE,
    build_adapter,
    check_init_adapter,
    hash_init_adapter,
    prepare_run_dir,
    train_adapter,
)
from openpulid.training.sharding import check_processes

__all__ = [
    "ADAPTER_FILE",
    "ALIGN_PROMPTS",
    "DEFAULT_PIXELS",
    "HELD_OUT_BATCHES",
    "HeldOutLosses",
    "BaseModel",
    "Batch",
    "BatchSource",
    "DiffusionLoss",
    "DiffusionStep",
    "FluxModel",
    "FluxText",
    "PuLIDTask",
    "Recipe",
    "SDXLModel",
    "TextConditioning",
    "Validation",
    "build_adapter",
    "check_init_adapter",
    "check_processes",
    "diffusion_branch",
    "drop_captions",
    "drop_identity",
    "find_recipe",
    "hash_init_adapter",
    "loss_weight_map",
    "prepare_run_dir",
    "save_adapter",
    "standard_error",
    "summarize_held_out",
    "swap_identities",
    "train_adapter",
]
