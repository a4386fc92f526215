"""Images, masks and landmarks of a dataset as tensors, and its rows in batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from openpulid.world import PARTS, WorldDataset

FACE = PARTS.index("face")


def load_faces(
    data: WorldDataset, rows: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Load images with their face masks and landmarks.

    Args:
        data: the data set.
        rows: (B,) rows to load.
        device: where the tensors are placed.

    Returns:
        Images (B, 3, S, S) and face masks (B, 1, S, S), float in [0, 1], and landmarks (B, 5, 2) in
        pixels.
    """
    images = torch.from_numpy(data.images[rows]).to(device).float() / 255
    masks = (torch.from_numpy(data.parts[rows]).to(device)[:, None] == FACE).float()
    return images, masks, torch.from_numpy(data.landmarks[rows]).to(device)


def batches(count: int, max_rows: int, size: int = 64) -> list[np.ndarray]:
    """Split row numbers below `count` into batches.

    Args:
        count: number of rows of the dataset.
        max_rows: maximum number of rows to use, spread evenly.
        size: rows per batch.
    """
    rows = np.unique(np.linspace(0, count - 1, min(max_rows, count)).astype(np.int64))
    return [rows[start : start + size] for start in range(0, len(rows), size)]
