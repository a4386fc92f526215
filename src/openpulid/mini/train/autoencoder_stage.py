"""Build stage of the autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.faces.mini_recognition import RECOGNITION_MODELS
from openpulid.io.checkpoints import load_module
from openpulid.mini.models.pipeline import save_folder
from openpulid.mini.train.autoencoder import (
    AutoencoderTask,
    batches,
    build_autoencoder,
    measure_psnr,
    reconstruct,
    set_scaling_factor,
)
from openpulid.mini.train.build_context import BuildContext, stamp
from openpulid.mini.train.recognition import CROP, align_faces, embed_crops, load_faces
from openpulid.training.config import TrainerConfig


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


def _measure_face_similarity(
    context: BuildContext, vae: PatchAutoencoderKL, max_images: int = 512
) -> dict[str, float]:
    """Measure the cosine of the scorer's embeddings of images and of their reconstructions.

    Returns an empty result if the scorer is not trained yet.
    """
    path = context.weights / "recognition-scorer.safetensors"
    if not path.exists():
        return {}
    scorer = load_module(RECOGNITION_MODELS["scorer"], path, context.device)
    original_crops: list[Tensor] = []
    reconstructed_crops: list[Tensor] = []
    for rows in batches(len(context.held_out), max_images):
        images, masks, landmarks = load_faces(context.held_out, rows, context.device)
        original_crops.append(_crop(images, masks, landmarks))
        reconstructed_crops.append(_crop(reconstruct(vae, images), masks, landmarks))
    originals = embed_crops(scorer, torch.cat(original_crops))
    reconstructions = embed_crops(scorer, torch.cat(reconstructed_crops))
    return {"face_sim": (originals * reconstructions).sum(-1).mean().item()}


def _crop(images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
    """Return aligned face crops as uint8 on the CPU."""
    return (align_faces(images, masks, landmarks, CROP) * 255).round().byte().cpu()
