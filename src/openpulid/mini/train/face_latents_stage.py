"""Build stage of the latent space that the miniature's W+ Adapter reads."""

from __future__ import annotations

import torch

from openpulid.identity.face_latents import FaceLatentEncoder
from openpulid.mini.evaluation.reconstructions import (
    measure_latent_values,
    measure_reconstructions,
)
from openpulid.mini.models import FaceGenerator
from openpulid.mini.train.build_context import PORTRAITS, BuildContext, Stage
from openpulid.mini.train.face_latents import FaceLatentsTask
from openpulid.training import TrainerConfig


def train_face_latents(context: BuildContext) -> dict[str, float]:
    """Train the encoder and the generator, write both and measure them on held-out people.

    Returns:
        The figures of `measure_reconstructions`, and `values_r2`: how well the facial values can be
        predicted from the latents, a mean of R2.
    """
    config = TrainerConfig(
        steps=40_000,
        lr=5e-3,
        optimizer="muon",
        weight_decay=0.1,
        warmup=50,
        decay=0.5,
        ema=0.998,
        seed=15,
        validate_every=1000,
    )
    torch.manual_seed(config.seed)
    encoder = FaceLatentEncoder()
    generator = FaceGenerator()
    portraits = context.open(PORTRAITS)
    task = FaceLatentsTask(
        encoder,
        generator,
        context.load_recognition("encoder"),
        [context.data, portraits],
        context.held_out,
    )
    context.train("face-latents", task, config)
    context.save_module(encoder, "face-latents", config)
    context.save_module(generator, "face-generator", config, "face-latents")
    encoder.eval()
    generator.eval()
    scorer = context.load_recognition("scorer")
    figures = measure_reconstructions(encoder, generator, context.held_out, scorer)
    values = measure_latent_values(encoder, portraits, context.held_out)
    return {**figures, "values_r2": values.mean().item()}


FACE_LATENTS_STAGE = Stage("face-latents", 15, train_face_latents)
"""The latent space of W+ Adapter; no other method reads it."""
