"""Aligned faces on white, the images of the face latents."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity

from openpulid.faces.align import GRAY, TEMPLATE, WHITE, crop_faces, replace_background
from openpulid.faces.augment import random_affine
from openpulid.faces.miniature import CROP
from openpulid.mini.data import load_faces
from openpulid.world import WorldDataset

LANDMARKS = TEMPLATE * CROP
"""(5, 2) pixels of a crop, where the landmarks are after the alignment, about."""


def load_crops(
    data: WorldDataset,
    rows: np.ndarray,
    device: torch.device,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Load aligned faces on white (B, 3, 64, 64) in [0, 1], and their masks (B, 1, 64, 64).

    Args:
        data: the dataset.
        rows: (B,) rows to load.
        device: where the tensors are placed.
        generator: if not None, crops are moved, turned and scaled a little, as detected landmarks
            differ from the exact ones of the dataset.
    """
    jitter = None
    if generator is not None:
        jitter = random_affine(len(rows), CROP, generator, turn=0.04, grow=0.03, shift=0.01)
    crops, masks = crop_faces(*load_faces(data, rows, device), CROP, jitter)
    return replace_background(crops, masks, WHITE), masks


def compare_faces(model: nn.Module, faces: Tensor, others: Tensor, masks: Tensor) -> Tensor:
    """Compute the cosine of a recognition model's embeddings of faces and other images, (B,).

    Args:
        model: a face recognition model.
        faces: (B, 3, 64, 64) in [0, 1], aligned.
        others: the same faces, differentiable.
        masks: (B, 1, 64, 64), the pixels that the model sees.
    """
    embedding = model(replace_background(faces, masks, GRAY))
    return cosine_similarity(embedding, model(replace_background(others, masks, GRAY)), dim=1)
