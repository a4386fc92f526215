"""Build stage of the few-step student of the base model."""

from __future__ import annotations

from copy import deepcopy

import torch
from diffusers import UNet2DConditionModel

from openpulid.mini.models import save_folder
from openpulid.mini.train.base_stage import can_compile, load_evaluator
from openpulid.mini.train.build_context import BuildContext, make_progress_printer, stamp
from openpulid.mini.train.distill import STUDENT_TIMESTEPS, LightningTask, TeacherTrajectories
from openpulid.training import TrainerConfig, autocast

NUM_TRAJECTORIES = 4096
"""Trajectories of the teacher; they take about nine minutes on two cores."""
DISTILLATION_TIME_SHARE = 0.6
"""Share of the student's time budget that is left for training after the trajectories."""


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
    evaluator = load_evaluator(
        context, text_encoders, steps=STUDENT_TIMESTEPS, guidance=1.0, order=1
    )
    is_compiled = can_compile(context.device)
    task = LightningTask(student, text_encoders, trajectories, evaluator, compiled=is_compiled)
    context.train("lightning", task, config, DISTILLATION_TIME_SHARE)
    save_folder(student, context.weights / "lightning")
    stamp(context.weights / "lightning", context.describe_training("lightning", config))
    return evaluator.evaluate(student)
