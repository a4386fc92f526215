"""Frozen models that the later stages of the miniature's training need for their losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor

from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.miniature import RECOGNITION_MODELS, MiniFaceDetector
from openpulid.io.checkpoints import load_module
from openpulid.pipelines.factory import load_pipeline
from openpulid.pipelines.presets import mini_flux_4step, mini_lightning
from openpulid.training.pulid import BaseModel, FluxModel, Recipe, SDXLModel

GUIDED_TRANSFORMER = Path("flux", "guided-transformer")
"""Folder of FLUX's base with a guidance embedding, below the weights. It is not shipped."""


def create_model(recipe: Recipe, pipe: Any) -> BaseModel:
    """Create the model of a recipe from its pipeline.

    On a CPU the U-Net gets plain matrix products in place of fused attention, so that a step takes
    a seventh less time (benchmarks/train-step.md). Attach methods afterwards.

    A transformer with a guidance embedding has the recipe's value of the diffusion branch. The
    student of the lightning branch has no such embedding.
    """
    if not recipe.is_flow:
        if pipe.unet.device.type == "cpu":
            pipe.unet.set_attn_processor(AttnProcessor())
        return SDXLModel(pipe)
    return FluxModel(
        pipe,
        pixels=pipe.vae.config.sample_size,
        guidance=recipe.guidance_embedding,
        max_sequence_length=recipe.text_tokens,
        logit_mean=recipe.logit_mean,
        logit_std=recipe.logit_std,
    )


def load_student(recipe: Recipe, weights: Path, device: torch.device) -> BaseModel:
    """Load the few-step student of a recipe's base, the model of the lightning branch."""
    preset = mini_flux_4step if recipe.is_flow else mini_lightning
    return create_model(recipe, load_pipeline(preset(weights), device))


def load_face_embedder(
    weights: Path, device: torch.device, is_ensemble: bool = False
) -> FaceEmbedder:
    """Load the face embedder of the ID loss, with a recognition model of its own.

    Args:
        weights: folder of the miniature's weights.
        device: of the models.
        is_ensemble: also use the recognition model of the identity encoder.
    """
    return _load_embedder(weights, device, ("loss", "encoder") if is_ensemble else ("loss",))


def load_scorer(weights: Path, device: torch.device) -> FaceEmbedder:
    """Load the face embedder that validates the ID loss, with the benchmark's recognition model."""
    return _load_embedder(weights, device, ("scorer",))


def _load_embedder(weights: Path, device: torch.device, names: tuple[str, ...]) -> FaceEmbedder:
    detector = load_module(MiniFaceDetector, weights / "detector.safetensors", device)
    models = [
        load_module(RECOGNITION_MODELS[name], weights / f"recognition-{name}.safetensors", device)
        for name in names
    ]
    return FaceEmbedder(detector.detect, *models, segment=detector.segment)
