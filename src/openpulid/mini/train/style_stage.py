"""Build stage of the miniature's IP-Adapter for a style image (arXiv 2308.06721)."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import CLIPVisionModelWithProjection

from openpulid.mini.train.baseline_stages import find_baseline_recipe, train_task
from openpulid.mini.train.baseline_task import BaselineTask
from openpulid.mini.train.baselines.ip_adapter import style
from openpulid.mini.train.build_context import BuildContext, Stage
from openpulid.mini.train.style_data import open_style_images
from openpulid.pipelines.factory import load_pipeline
from openpulid.pipelines.presets import mini
from openpulid.training.pulid import SDXLModel


def train_style(context: BuildContext) -> dict[str, float]:
    """Train the IP-Adapter with the steps of PuLID's first stage, and write it.

    The face weighs as much as the rest of the image, which shows the style as well. The portraits
    of PuLID's stages are left out, because all of them are photos in studio light.
    """
    recipe = replace(
        find_baseline_recipe(context, "style"), face_loss_weight=1.0, landmark_loss_weight=1.0
    )
    pipe = load_pipeline(mini(context.weights), context.device)
    encoder = context.load_model(CLIPVisionModelWithProjection, "clip")
    torch.manual_seed(recipe.seed)
    baseline = style(pipe, encoder.config.projection_dim)
    data, held_out = (
        open_style_images(context, name, encoder, pipe.tokenizer, recipe.batch)
        for name in ("world", "world-held-out")
    )
    return train_task(
        context, "style", BaselineTask(recipe, SDXLModel(pipe), baseline, data, held_out)
    )


STYLE_STAGE = Stage("style", 90, train_style)
"""Trained like the baselines, see `BASELINE_STAGES`, and selected in the same way."""
