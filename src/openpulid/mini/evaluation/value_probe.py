"""How well facial values can be predicted from features: a ridge regression."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from openpulid.mini.data import batches
from openpulid.mini.train.portraits import find_frontal
from openpulid.mini.train.recognition import FACIAL_COLUMNS
from openpulid.world import WorldDataset

RIDGE = 0.1


class ValueRegression:
    """Ridge regression of the facial values on standardized features.

    Args:
        features: (N, D) float64 of training people.
        values: (N, V) float64, theirs.
    """

    def __init__(self, features: Tensor, values: Tensor) -> None:
        self.mean, self.scale = features.mean(0), features.std(0) + 1e-6
        self.center = values.mean(0)
        x = (features - self.mean) / self.scale
        gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        self.weight = torch.linalg.solve(gram, x.T @ (values - self.center))

    def __call__(self, features: Tensor) -> Tensor:
        """Predict values (N, V) from features (N, D)."""
        return (features - self.mean) / self.scale @ self.weight + self.center


def explained_variance(predictions: Tensor, values: Tensor) -> Tensor:
    """Compute R2 of each value, (V,): 1 is perfect, 0 is chance."""
    return 1 - (predictions - values).square().mean(0) / values.var(0, unbiased=False)


@torch.no_grad()
def measure_explained_values(
    encode: Callable[[WorldDataset, np.ndarray], Tensor],
    data: WorldDataset,
    held_out: WorldDataset,
    max_images: int = 4096,
) -> Tensor:
    """Compute R2 of the facial values of held-out people on frontal photos, (V,).

    Args:
        encode: returns the features (B, D) of rows of a dataset.
        data: images of training people, to which the regression is fitted.
        held_out: images of held-out people.
        max_images: maximum number of images of training people.
    """
    rows = batches(len(data), max_images)
    frontal = np.flatnonzero(find_frontal(held_out))
    regression = ValueRegression(
        torch.cat([encode(data, chunk) for chunk in rows]).double().cpu(),
        _values(data, np.concatenate(rows)),
    )
    chunks = np.array_split(frontal, -(-len(frontal) // 64))
    features = torch.cat([encode(held_out, chunk) for chunk in chunks])
    return explained_variance(regression(features.double().cpu()), _values(held_out, frontal))


def _values(data: WorldDataset, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(data.vectors[rows][:, FACIAL_COLUMNS])).double()
