"""A network that reads the facial parameters of the person in an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.miniature import MiniFaceDetector, VGGRecognition
from openpulid.mini.data import batches
from openpulid.mini.train.recognition import FACIAL_COLUMNS, ValueHead, load_aligned_crops
from openpulid.world import Person, WorldDataset


class ValueReader(nn.Module):
    """Predicts facial parameters from aligned crops.

    Unlike the recognition models it is trained with the parameters alone, without a margin between
    people, and no method is trained with it.

    Args:
        dim: width of the layer before the output.
    """

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"dim": dim}
        self.network = VGGRecognition(dim=dim)
        self.head = ValueHead(dim)

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops (B, 3, 64, 64) to parameters (B, V), about 0 to 1."""
        parameters: Tensor = self.head(self.network(crops))
        return parameters


class ValueScorer:
    """Reads the facial parameters of images.

    Args:
        detector: detects the faces.
        reader: the network.
    """

    def __init__(self, detector: MiniFaceDetector, reader: ValueReader) -> None:
        self.read = FaceEmbedder(detector.detect, reader)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Read images (B, 3, H, W) in [0, 1], (B, V); zero without a face."""
        faces = self.read(images)
        if faces.has_face.any():
            return faces.embeddings
        return images.new_zeros(len(images), len(FACIAL_COLUMNS))


@torch.no_grad()
def measure_reader(reader: ValueReader, data: WorldDataset, limit: int = 1024) -> dict[str, float]:
    """Measure the mean absolute error of a reader on evenly spaced images.

    Returns:
        error: of the reader; chance: of predicting the mean person each time.
    """
    device = next(reader.parameters()).device
    predictions, parameters = [], []
    for rows in batches(len(data), limit):
        crops = load_aligned_crops(data, rows).to(device)
        predictions.append(reader(crops.float() / 255).cpu())
        parameters.append(torch.from_numpy(np.asarray(data.vectors[rows][:, FACIAL_COLUMNS])))
    predicted, truth = torch.cat(predictions), torch.cat(parameters)
    return {
        "error": (predicted - truth).abs().mean().item(),
        "chance": (truth.mean(0) - truth).abs().mean().item(),
    }


def get_facial_values(people: Sequence[str]) -> Tensor:
    """Return the true facial parameters (P, V) of subjects by the names of `synthetic_subjects`."""
    vectors = [Person.from_seed(int(name)).vector() for name in people]
    return torch.tensor(vectors)[:, FACIAL_COLUMNS]
