"""Build stage of the text-to-image base model, and what it shares with the other base's stage."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch

from openpulid.mini.data import Captions, Latents, PairDataset
from openpulid.mini.evaluation.image_evaluator import ImageEvaluator
from openpulid.mini.models import build_pipeline, build_unet, save_folder
from openpulid.mini.train.base_task import BaseTask, TrainingImages
from openpulid.mini.train.build_context import (
    PORTRAITS,
    BuildContext,
    stamp,
)
from openpulid.mini.train.latent_space import load_first_unet
from openpulid.mini.train.networks import SDXLNetwork
from openpulid.training import TrainerConfig

NUM_PAIRS = 16_384
"""Images of two people; they are half as many as the training shows of them."""
TRAINING_DATASETS = ("world", PORTRAITS)
"""Portraits add more faces than the families of "world" have."""


def train_base(context: BuildContext) -> dict[str, float]:
    """Train the U-Net of the base model and write the pipeline's configuration."""
    config = base_config(seed=4)
    torch.manual_seed(config.seed)
    images, pairs = load_training_images(context)
    text_encoders = context.load_text_encoders()
    vae = context.load_vae()
    if context.begin is None:
        unet = build_unet(
            images.latents.images.shape[1],
            text_encoders.width,
            text_encoders.second.config.projection_dim,
            size=images.latents.images.shape[-1],
        )
    else:
        unet = load_first_unet(context, vae)
    pipe = build_pipeline(unet, vae, text_encoders, context.load_tokenizer())
    evaluator = load_evaluator(context, pipe)
    network = SDXLNetwork(unet, text_encoders, compiled=can_compile(context.device))
    result = context.train("base", BaseTask(network, images, pairs, evaluator), config)
    folder = context.weights / "pipeline"
    save_folder(unet, folder / "unet", in_8_bits=True)
    stamp(folder / "unet", context.describe_training("base", config))
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)
    return dict(result.metrics)


def base_config(seed: int) -> TrainerConfig:
    """Return the trainer's configuration for a base model."""
    return TrainerConfig(
        steps=32_000,  # 2 million images, or what the time budget allows
        lr=3e-3,
        optimizer="muon",
        weight_decay=0.1,
        warmup=100,
        decay=0.6,
        ema=0.999,
        seed=seed,
        validate_every=1500,
    )


def load_training_images(
    context: BuildContext, latent_patch: int = 1
) -> tuple[TrainingImages, TrainingImages]:
    """Load the images of a base model's training: of one person, and of two.

    Args:
        context: of the build.
        latent_patch: of the base's autoencoder, see `PatchAutoencoderKL`.
    """
    data = PairDataset(context.data, NUM_PAIRS)
    pair_latents = context.load_latents("world-pairs", data)
    return (
        load_images(context, latent_patch),
        TrainingImages(
            pair_latents.arrange(latent_patch), context.load_captions("world-pairs", data=data)
        ),
    )


def load_images(
    context: BuildContext, latent_patch: int = 1, datasets: Sequence[str] = TRAINING_DATASETS
) -> TrainingImages:
    """Load latents and captions of images of one person.

    Args:
        context: of the build.
        latent_patch: of the base's autoencoder, see `PatchAutoencoderKL`.
        datasets: names of the datasets.
    """
    latents = Latents.concatenate([context.load_latents(name) for name in datasets])
    captions = Captions.concatenate([context.load_captions(name) for name in datasets])
    return TrainingImages(latents.arrange(latent_patch), captions)


def load_evaluator(context: BuildContext, pipe: Any, **options: Any) -> ImageEvaluator:
    """Load the evaluator of a base model or of its student.

    Args:
        context: of the build.
        pipe: the pipeline of the model.
        **options: other attributes of the evaluator, such as the number of steps.
    """
    return ImageEvaluator.load(context.weights, context.device, pipe=pipe, **options)


def can_compile(device: torch.device) -> bool:
    """Check whether `torch.compile` can run: on a CPU it requires a C++ compiler."""
    return device.type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++"))
