"""Figures of the face latents: reconstructions, and what the latents tell of a face."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from openpulid.identity.face_latents import FaceLatentEncoder
from openpulid.mini.data import batches
from openpulid.mini.evaluation.value_probe import measure_explained_values
from openpulid.mini.models import FaceGenerator
from openpulid.mini.train.face_crops import compare_faces, load_crops
from openpulid.world import WorldDataset


@torch.no_grad()
def reconstruct(encoder: FaceLatentEncoder, generator: FaceGenerator, faces: Tensor) -> Tensor:
    """Encode and generate faces (B, 3, 64, 64) in [0, 1]; return the images in [0, 1]."""
    images: Tensor = generator(encoder(faces))
    return (images / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def measure_reconstructions(
    encoder: FaceLatentEncoder,
    generator: FaceGenerator,
    data: WorldDataset,
    scorer: nn.Module | None = None,
    max_images: int = 2048,
) -> dict[str, float]:
    """Measure the reconstructions of faces.

    Args:
        encoder: of the latents.
        generator: of the images.
        data: images of held-out people.
        scorer: a face recognition model.
        max_images: maximum number of images, spread evenly over the dataset.

    Returns:
        `psnr_face`: mean PSNR of the pixels of the face in dB; `offsets`: root mean square of the
        offsets, where the first latent has 1; `face_sim`: mean cosine of the scorer's embeddings of
        a face and its reconstruction, if there is a scorer.
    """
    psnr, offsets, similarity = [], [], []
    for rows in batches(len(data), max_images):
        faces, masks = load_crops(data, rows, encoder.device)
        latents = encoder(faces)
        decoded = (generator(latents) / 2 + 0.5).clamp(0, 1)
        error = (decoded - faces).square().mean(1, keepdim=True)
        error = (error * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)).clamp(min=1)
        psnr.append(-10 * error.clamp(min=1e-10).log10())
        offsets.append((latents[:, 1:] - latents[:, :1]).square().mean((1, 2)))
        if scorer is not None:
            similarity.append(compare_faces(scorer, faces, decoded, masks))
    figures = {
        "psnr_face": torch.cat(psnr).mean().item(),
        "offsets": torch.cat(offsets).mean().sqrt().item(),
    }
    if similarity:
        figures["face_sim"] = torch.cat(similarity).mean().item()
    return figures


def measure_latent_values(
    encoder: FaceLatentEncoder, data: WorldDataset, held_out: WorldDataset
) -> Tensor:
    """Compute how well latents predict each facial value, see `measure_explained_values`."""

    def encode(images: WorldDataset, rows: np.ndarray) -> Tensor:
        faces, _ = load_crops(images, rows, encoder.device)
        latents: Tensor = encoder(faces)
        return latents.flatten(1)

    return measure_explained_values(encode, data, held_out)
