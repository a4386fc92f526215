"""Facial values read back from a picture: a linear map on the judge's embedding, fitted in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from openpulid.mini.train.autoencoder import batches
from openpulid.mini.train.recognition import FACIAL_COLUMNS, aligned_rows, embedded
from openpulid.world import Person
from openpulid.world.dataset import WorldDataset

RIDGE = 1e-2
"""Of the squares' sum, over the embeddings' own."""


class ParameterProbe(nn.Module):
    """(B, D) embeddings of the judge -> (B, V) facial values, about 0 to 1.

    Args:
        dim: D; values: V.
    """

    def __init__(self, dim: int, values: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"dim": dim, "values": values}
        self.linear = nn.Linear(dim, values)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Any length of embedding: the judge's cosine has none either."""
        read: Tensor = self.linear(normalize(embeddings.float(), dim=-1))
        return read


@torch.no_grad()
def fit_probe(
    judge: nn.Module,
    data: WorldDataset,
    most: int = 8192,
    on_progress: Callable[[int, int], None] | None = None,
) -> ParameterProbe:
    """Least squares with a small ridge on pictures of people that no benchmark shows."""
    seen, known = embed_examples(judge, data, most, on_progress)
    joined = torch.cat([seen, torch.ones(len(seen), 1)], 1).double()
    square = joined.T @ joined
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square))
    solved = torch.linalg.solve(square, joined.T @ known.double()).float()
    reader = ParameterProbe(seen.shape[1], known.shape[1])
    reader.linear.weight.copy_(solved[:-1].T)
    reader.linear.bias.copy_(solved[-1])
    return reader


@torch.no_grad()
def measure_probe(
    reader: ParameterProbe, judge: nn.Module, data: WorldDataset, most: int = 1024
) -> dict[str, float]:
    """Mean error on these people, and that of saying the mean person each time."""
    seen, known = embed_examples(judge, data, most)
    return {
        "error": (reader(seen) - known).abs().mean().item(),
        "chance": (known.mean(0) - known).abs().mean().item(),
    }


def embed_examples(
    judge: nn.Module,
    data: WorldDataset,
    most: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) and true facial values (N, V) of some pictures at even distances."""
    seen, known = [], []
    for rows in batches(len(data), most):
        seen.append(embedded(judge, aligned_rows(data, rows)))
        known.append(torch.from_numpy(np.asarray(data.vectors[rows][:, FACIAL_COLUMNS])))
        if on_progress:
            on_progress(len(seen), -(-most // len(rows)))
    return torch.cat(seen), torch.cat(known)


def get_facial_values(people: Sequence[str]) -> Tensor:
    """(P, V): the facial values of people by their numbers, as `mini.sitters` names them."""
    vectors = [Person.from_seed(int(name)).vector() for name in people]
    return torch.tensor(vectors)[:, FACIAL_COLUMNS]
