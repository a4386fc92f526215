"""Build stages of the training images and of the autoencoder."""

from __future__ import annotations

from typing import Any

import torch

from openpulid.mini.models import save_folder
from openpulid.mini.train.autoencoder import (
    AutoencoderTask,
    build_autoencoder,
    measure_face_similarity,
    measure_psnr,
    set_scaling_factor,
)
from openpulid.mini.train.build_context import PORTRAITS, BuildContext, make_progress_printer, stamp
from openpulid.training import TrainerConfig
from openpulid.world.dataset import Plan, build_dataset


def plan_world(context: BuildContext) -> dict[str, Plan]:
    """Return the plans of training images, held-out people and portraits by dataset."""
    return {
        "world": context.plan,
        "world-held-out": context.held_out_plan,
        PORTRAITS: context.portrait_plan,
    }


def render_world(context: BuildContext) -> dict[str, float]:
    """Render the datasets of training images, held-out people and portraits."""
    context.runs.mkdir(parents=True, exist_ok=True)
    num_images = {}
    for name, plan in plan_world(context).items():
        dataset = build_dataset(
            context.runs / name,
            plan,
            device=str(context.device),
            on_progress=make_progress_printer(name),
        )
        num_images[name] = len(dataset)
    return {
        "pictures": num_images["world"],
        "held_out": num_images["world-held-out"],
        "portraits": num_images[PORTRAITS],
    }


def train_autoencoder(context: BuildContext) -> dict[str, float]:
    """Train the autoencoder of the pipeline."""
    config = TrainerConfig(steps=40_000, lr=8e-4, decay=0.4, ema=0.998, seed=0, validate_every=1000)
    torch.manual_seed(config.seed)
    vae = build_autoencoder(context.data)
    context.train("autoencoder", AutoencoderTask(vae, context.data, context.held_out), config)
    set_scaling_factor(vae, context.data)
    folder = context.weights / "pipeline" / "vae"
    save_folder(vae, folder)
    stamp(folder, context.describe_training("autoencoder", config))
    return {**measure_psnr(vae, context.held_out), **_measure_face_similarity(context, vae)}


def _measure_face_similarity(context: BuildContext, vae: Any) -> dict[str, float]:
    """Measure the face similarity; return an empty result if the scorer is not trained yet."""
    if not (context.weights / "recognition-scorer.safetensors").exists():
        return {}
    scorer = context.load_recognition("scorer")
    return {"face_sim": measure_face_similarity(vae, scorer, context.held_out)}
