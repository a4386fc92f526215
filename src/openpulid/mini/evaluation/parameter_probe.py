"""Linear probe from face embeddings to facial parameters, fitted in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from openpulid.mini.data import batches
from openpulid.mini.train.recognition import FACIAL_COLUMNS, embed_crops, load_aligned_crops
from openpulid.world import Person, WorldDataset

RIDGE = 1e-2
"""Ridge penalty relative to the mean square of the embeddings."""


class ParameterProbe(nn.Module):
    """Predicts facial parameters from embeddings of the benchmark's face recognition model.

    Args:
        dim: width of the embeddings.
        values: number of parameters.
    """

    def __init__(self, dim: int, values: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"dim": dim, "values": values}
        self.linear = nn.Linear(dim, values)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings (B, D) of any length to parameters (B, V), about 0 to 1.

        Embeddings are normalized first, since the benchmark compares them by their cosine.
        """
        parameters: Tensor = self.linear(normalize(embeddings.float(), dim=-1))
        return parameters


@torch.no_grad()
def fit_probe(
    recognition: nn.Module,
    data: WorldDataset,
    limit: int = 8192,
    on_progress: Callable[[int, int], None] | None = None,
) -> ParameterProbe:
    """Fit a probe by ridge regression on people who are not in the benchmark.

    Args:
        recognition: the face recognition model of the benchmark.
        data: images of training people.
        limit: maximum number of images.
        on_progress: called with the number of batches done and their total.
    """
    embeddings, parameters = embed_examples(recognition, data, limit, on_progress)
    ones = torch.ones(len(embeddings), 1)
    design = torch.cat([embeddings, ones], 1).double()
    gram = design.T @ design
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, design.T @ parameters.double()).float()
    probe = ParameterProbe(embeddings.shape[1], parameters.shape[1])
    probe.linear.weight.copy_(solution[:-1].T)
    probe.linear.bias.copy_(solution[-1])
    return probe


@torch.no_grad()
def measure_probe(
    probe: ParameterProbe, recognition: nn.Module, data: WorldDataset, limit: int = 1024
) -> dict[str, float]:
    """Measure the mean absolute error of a probe.

    Returns:
        error: of the probe; chance: of predicting the mean person each time.
    """
    embeddings, parameters = embed_examples(recognition, data, limit)
    return {
        "error": (probe(embeddings) - parameters).abs().mean().item(),
        "chance": (parameters.mean(0) - parameters).abs().mean().item(),
    }


def embed_examples(
    recognition: nn.Module,
    data: WorldDataset,
    limit: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed evenly spaced images of a dataset.

    Args:
        recognition: the face recognition model.
        data: the dataset.
        limit: maximum number of images N.
        on_progress: called with the number of batches done and their total.

    Returns:
        Embeddings (N, D) and the true facial parameters (N, V).
    """
    embeddings = []
    parameters = []
    for rows in batches(len(data), limit):
        embeddings.append(embed_crops(recognition, load_aligned_crops(data, rows)))
        parameters.append(torch.from_numpy(np.asarray(data.vectors[rows][:, FACIAL_COLUMNS])))
        if on_progress:
            on_progress(len(embeddings), -(-limit // len(rows)))
    return torch.cat(embeddings), torch.cat(parameters)


def get_facial_values(people: Sequence[str]) -> Tensor:
    """Return the true facial parameters (P, V) of subjects by the names of `synthetic_subjects`."""
    vectors = [Person.from_seed(int(name)).vector() for name in people]
    return torch.tensor(vectors)[:, FACIAL_COLUMNS]
