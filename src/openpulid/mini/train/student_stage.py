"""Build stage of the few-step student of the base model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from openpulid.mini.models import build_pipeline, save_folder
from openpulid.mini.train.base_stage import can_compile, load_evaluator
from openpulid.mini.train.build_context import BuildContext, make_progress_printer, stamp
from openpulid.mini.train.distill import STUDENT_TIMESTEPS, LightningTask, TeacherTrajectories
from openpulid.mini.train.networks import BaseNetwork, SDXLNetwork
from openpulid.training import TrainerConfig, autocast

CONFIG = TrainerConfig(
    steps=60_000,
    lr=1e-3,
    optimizer="muon",
    warmup=50,
    decay=0.5,
    ema=0.998,
    seed=5,
    validate_every=2000,
)
NUM_TRAJECTORIES = 4096
"""Trajectories of the teacher; SDXL's take about nine minutes on two cores."""
DISTILLATION_TIME_SHARE = 0.6
"""Share of the student's time budget that is left for training after the trajectories."""


def train_student(context: BuildContext) -> dict[str, float]:
    """Compute trajectories of the base model and train its 4-step student on them."""
    text_encoders = context.load_text_encoders()
    teacher = context.load_model(UNet2DConditionModel, "pipeline", "unet")
    student = deepcopy(teacher).requires_grad_(True)
    pipe = build_pipeline(
        student, context.load_vae(), text_encoders, context.load_tokenizer(), order=1
    )

    def save() -> Path:
        save_folder(student, context.weights / "lightning", in_8_bits=True)
        return context.weights / "lightning"

    return distill(
        context,
        "lightning",
        SDXLNetwork(teacher, text_encoders),
        SDXLNetwork(student, text_encoders, compiled=can_compile(context.device)),
        pipe,
        save,
    )


def distill(
    context: BuildContext,
    name: str,
    teacher: BaseNetwork,
    student: BaseNetwork,
    pipe: Any,
    save: Callable[[], Path],
    config: TrainerConfig = CONFIG,
) -> dict[str, float]:
    """Train a student on trajectories of its teacher, and write it.

    Args:
        context: of the build.
        name: name of the stage.
        teacher: the frozen base model.
        student: a copy of it, of which all or a part trains.
        pipe: the pipeline of the student.
        save: writes the student and returns its file or folder.
        config: configuration of the trainer.

    Returns:
        The figures of the student.
    """
    torch.manual_seed(config.seed)
    with autocast(context.device):
        trajectories = TeacherTrajectories.build(
            teacher,
            context.load_captions(),
            NUM_TRAJECTORIES,
            context.runs / name / "trajectories",
            on_progress=make_progress_printer("trajectories"),
        )
    evaluator = load_evaluator(context, pipe, steps=STUDENT_TIMESTEPS, guidance=1.0)
    task = LightningTask(student, trajectories, evaluator)
    result = context.train(name, task, config, DISTILLATION_TIME_SHARE)
    stamp(save(), context.describe_training(name, config))
    return dict(result.metrics)
