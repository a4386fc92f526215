"""Build stage of the text-to-image base model."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from openpulid.mini.data import Captions, Latents, PairDataset
from openpulid.mini.evaluation.image_evaluator import ImageEvaluator
from openpulid.mini.models import TextEncoders, build_pipeline, build_unet, save_folder
from openpulid.mini.train.build_context import (
    BuildContext,
    stamp,
)
from openpulid.mini.train.latent_space import load_first_unet
from openpulid.mini.train.pulid import PORTRAITS
from openpulid.mini.train.unet import BaseTask, TrainingImages
from openpulid.training import TrainerConfig

NUM_PAIRS = 16_384
"""Images of two people; they are half as many as the training shows of them."""


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
    evaluator = load_evaluator(context, text_encoders)
    if context.begin is None:
        unet = build_unet(
            images.latents.images.shape[1],
            text_encoders.width,
            text_encoders.second.config.projection_dim,
            size=images.latents.images.shape[-1],
        )
    else:
        unet = load_first_unet(context, evaluator.vae)
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


def load_evaluator(
    context: BuildContext, text_encoders: TextEncoders, **options: Any
) -> ImageEvaluator:
    """Load the evaluator of the base model and its student.

    Args:
        context: of the build.
        text_encoders: of the pipeline.
        **options: other attributes of the evaluator, such as the number of steps.
    """
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
