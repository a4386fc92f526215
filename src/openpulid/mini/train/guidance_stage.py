"""Build stage of FLUX's base with a guidance embedding, for experiments; it is not shipped."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel

from openpulid.mini.models import save_folder
from openpulid.mini.train.base_stage import can_compile, load_images
from openpulid.mini.train.build_context import BuildContext, Stage, stamp
from openpulid.mini.train.flux_stages import load_teacher
from openpulid.mini.train.guidance import GuidanceTask, add_guidance_embedding
from openpulid.mini.train.loss_models import GUIDED_TRANSFORMER
from openpulid.mini.train.networks import FluxNetwork
from openpulid.training import TrainerConfig, autocast

CONFIG = TrainerConfig(
    steps=4000,
    lr=1e-3,
    optimizer="muon",
    warmup=50,
    decay=0.5,
    ema=0.99,
    seed=7,
    validate_every=200,
)


def train_guided_base(context: BuildContext) -> dict[str, float]:
    """Train a copy of FLUX's base that reads its guidance, as FLUX.1-dev does, and write it.

    It is stored in bfloat16: 8 bits, as in the base, would add an error of their own.
    """
    torch.manual_seed(CONFIG.seed)
    compiled = can_compile(context.device)
    teacher, vae = load_teacher(context, compiled)
    transformer = add_guidance_embedding(teacher.transformer)
    side = teacher.latent_shape[-1]
    student = FluxNetwork(transformer, teacher.text_encoders, side, compiled)
    latent_patch = vae.config.latent_patch
    images = load_images(context, latent_patch)
    held_out = load_images(context, latent_patch, ["world-held-out"])
    task = GuidanceTask(student, teacher, images, held_out)
    context.train(GUIDANCE_STAGE.name, task, CONFIG)
    folder = context.weights / GUIDED_TRANSFORMER
    save_folder(transformer, folder)
    stamp(folder, context.describe_training(GUIDANCE_STAGE.name, CONFIG))
    saved = context.load_model(FluxTransformer2DModel, *GUIDED_TRANSFORMER.parts)
    transformer.load_state_dict(saved.state_dict())  # the figures are those of the file
    with autocast(context.device, CONFIG.bf16):
        return dict(task.validate())


GUIDANCE_STAGE = Stage("flux-guidance", 20, train_guided_base)
"""Selected by its name alone; the sweep `flux-stage1` trains adapters on its network."""
