"""Face features of a dataset as the identity encoder sees them, computed once for the adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openpulid.identity.extractor import MiniExtractor
from openpulid.io.checkpoints import module_fingerprint
from openpulid.mini.data.cache import ArrayCache
from openpulid.mini.data.loading import load_faces
from openpulid.world import WorldDataset


class FaceFeatures:
    """Identity features of N images.

    Attributes:
        id_cond: (N, C) float32 embeddings.
        hidden: (N, 5, 1 + patches, D) float16 hidden states of the vision encoder, memory-mapped.
    """

    def __init__(self, id_cond: np.ndarray, hidden: np.ndarray) -> None:
        self.id_cond = id_cond
        self.hidden = hidden

    @classmethod
    def build(
        cls,
        extractor: MiniExtractor,
        data: WorldDataset,
        folder: Path,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> FaceFeatures:
        """Extract the features of all faces, or load them if they are cached.

        The exact masks and landmarks of the dataset are used instead of detected ones.

        Args:
            extractor: the networks of the identity encoder.
            data: the dataset.
            folder: folder of the cache.
            on_progress: called with the number of images done and their total.
        """
        key = {
            **data.key,
            "recognition": module_fingerprint(extractor.recognition),
            "vision_encoder": module_fingerprint(extractor.vision_encoder),
        }
        cache = ArrayCache(folder, key, len(data))
        cache.fill(lambda rows: _extract(extractor, data, rows), on_progress=on_progress)
        return cls(cache.load("id_cond"), cache.load("hidden", mmap=True))

    def rows(
        self, rows: np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, list[Tensor]]:
        """Return id_cond (B, C) and five hidden states (B, 1 + patches, D) in float32."""
        hidden = torch.from_numpy(self.hidden[rows]).to(device).float()
        return torch.from_numpy(self.id_cond[rows]).to(device), list(hidden.unbind(1))


@torch.no_grad()
def _extract(
    extractor: MiniExtractor, data: WorldDataset, rows: np.ndarray
) -> dict[str, np.ndarray]:
    id_cond, hidden = extractor.extract_batch(*load_faces(data, rows, extractor.device))
    return {
        "id_cond": id_cond.float().cpu().numpy(),
        "hidden": torch.stack(hidden, 1).half().cpu().numpy(),
    }
