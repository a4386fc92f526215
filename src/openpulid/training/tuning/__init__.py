"""Tuning on a few images of one person: Textual Inversion, DreamBooth, LoRA, Custom Diffusion."""

from openpulid.training.tuning.recipes import TUNING_METHODS, TuningRecipe, find_tuning_recipe
from openpulid.training.tuning.tune import CLASS_IMAGES, tune

__all__ = ["CLASS_IMAGES", "TUNING_METHODS", "TuningRecipe", "find_tuning_recipe", "tune"]
