"""Build stages of the text-to-image base model and its few-step student."""

from __future__ import annotations

import shutil
from copy import deepcopy
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from openpulid.mini.data import Captions, Latents, PairDataset
from openpulid.mini.evaluation.image_evaluator import ImageEvaluator
from openpulid.mini.models import TextEncoders, build_pipeline, build_unet, save_folder
from openpulid.mini.train.build_context import (
    BuildContext,
    make_progress_printer,
    stamp,
)
from openpulid.mini.train.distill import STUDENT_TIMESTEPS, LightningTask, TeacherTrajectories
from openpulid.mini.train.pulid import PORTRAITS
from openpulid.mini.train.unet import BaseTask, TrainingImages
from openpulid.training import TrainerConfig, autocast

NUM_PAIRS = 16_384
"""Images of two people; they are half as many as the training shows of them."""
NUM_TRAJECTORIES = 4096
"""Trajectories of the teacher; they take about nine minutes on two cores."""
DISTILLATION_TIME_SHARE = 0.6
"""Share of the student's time budget that is left for training after the trajectories."""


def train_base(context: BuildContext) -> dict[str, float]:
    """Train the U-Net of the base model and write the pipeline's configuration."""
    config = TrainerConfig(
        steps=32_000,  # 2 million images, or what the time budget allows
        lr=3e-3,
        optimizer="muon",
        weight_decay=0.1,
        warmup=100,
        decay=0.6,
        ema=0.999,
        seed=4,
        validate_every=1500,
    )
    torch.manual_seed(config.seed)
    # Portraits add more faces than the families of "world" have.
    datasets = ("world", PORTRAITS)
    images = TrainingImages(
        Latents.concatenate([context.load_latents(name) for name in datasets]),
        Captions.concatenate([context.load_captions(name) for name in datasets]),
    )
    data = PairDataset(context.data, NUM_PAIRS)
    pairs = TrainingImages(
        context.load_latents("world-pairs", data), context.load_captions("world-pairs", data=data)
    )
    text_encoders = context.load_text_encoders()
    evaluator = _load_evaluator(context, text_encoders)
    unet = build_unet(
        images.latents.images.shape[1],
        text_encoders.width,
        text_encoders.second.config.projection_dim,
        size=images.latents.images.shape[-1],
    )
    is_compiled = can_compile(context.device)
    task = BaseTask(unet, text_encoders, images, pairs, evaluator, compiled=is_compiled)
    context.train("base", task, config)
    folder = context.weights / "pipeline"
    save_folder(unet, folder / "unet")
    stamp(folder / "unet", context.describe_training("base", config))
    pipe = build_pipeline(unet, evaluator.vae, text_encoders, evaluator.tokenizer)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)
    return evaluator.evaluate(unet)


def train_student(context: BuildContext) -> dict[str, float]:
    """Compute trajectories of the base model and train its 4-step student on them."""
    config = TrainerConfig(
        steps=60_000,
        lr=1e-3,
        optimizer="muon",
        warmup=50,
        decay=0.5,
        ema=0.998,
        seed=5,
        validate_every=2000,
    )
    torch.manual_seed(config.seed)
    text_encoders = context.load_text_encoders()
    teacher = context.load_model(UNet2DConditionModel, "pipeline", "unet").to(
        memory_format=torch.channels_last
    )
    with autocast(context.device):
        trajectories = TeacherTrajectories.build(
            teacher,
            text_encoders,
            context.load_captions(),
            NUM_TRAJECTORIES,
            context.runs / "lightning" / "trajectories",
            on_progress=make_progress_printer("trajectories"),
        )
    student = deepcopy(teacher).requires_grad_(True)
    evaluator = _load_evaluator(
        context, text_encoders, steps=STUDENT_TIMESTEPS, guidance=1.0, order=1
    )
    is_compiled = can_compile(context.device)
    task = LightningTask(student, text_encoders, trajectories, evaluator, compiled=is_compiled)
    context.train("lightning", task, config, DISTILLATION_TIME_SHARE)
    save_folder(student, context.weights / "lightning")
    stamp(context.weights / "lightning", context.describe_training("lightning", config))
    return evaluator.evaluate(student)


def _load_evaluator(
    context: BuildContext, text_encoders: TextEncoders, **options: Any
) -> ImageEvaluator:
    return ImageEvaluator.load(
        context.weights,
        context.device,
        vae=context.load_vae(),
        text_encoders=text_encoders,
        tokenizer=context.load_tokenizer(),
        **options,
    )


def can_compile(device: torch.device) -> bool:
    """Check whether `torch.compile` can run: on a CPU it requires a C++ compiler."""
    return device.type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++"))
