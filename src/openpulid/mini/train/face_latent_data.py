"""Face latents of a dataset, and editing directions among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openpulid.identity.extractor import FaceLatentExtractor
from openpulid.io.checkpoints import module_fingerprint
from openpulid.mini.data import ArrayCache, batches, load_faces
from openpulid.mini.train.recognition import FACIAL_COLUMNS
from openpulid.world import WorldDataset

LARGEST_EDIT = 0.5
"""Change of a facial value, of 0 to 1, at the end of a direction."""


class FaceLatentRows:
    """The face latents of a dataset's images, computed once.

    Attributes:
        latents: (N, 18 * W) float16, memory-mapped.
    """

    def __init__(self, latents: np.ndarray) -> None:
        self.latents = latents

    @classmethod
    @torch.no_grad()
    def build(
        cls, extractor: FaceLatentExtractor, data: WorldDataset, folder: Path
    ) -> FaceLatentRows:
        """Compute the latents with the exact masks and landmarks, or load them from the cache."""
        key = {**data.key, "encoder": module_fingerprint(extractor.network)}

        def extract(rows: np.ndarray) -> dict[str, np.ndarray]:
            latents = extractor.extract_batch(*load_faces(data, rows, extractor.network.device))
            return {"latents": latents.flatten(1).half().cpu().numpy()}

        cache = ArrayCache(folder, key, len(data))
        cache.fill(extract)
        return cls(cache.load("latents", mmap=True))

    def rows(
        self, rows: np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (B, 18 * W) latents, and no hidden states."""
        return torch.from_numpy(self.latents[rows]).to(device).float(), []


@torch.no_grad()
def load_directions(
    extractor: FaceLatentExtractor, data: WorldDataset, max_images: int = 4096
) -> Tensor:
    """Compute an editing direction for each facial value from images of training people.

    Args:
        extractor: of the latents.
        data: images of people whose values are known.
        max_images: maximum number of images.

    Returns:
        (V, 18, W), see `fit_directions`.
    """
    latents, values = [], []
    for rows in batches(len(data), max_images):
        latents.append(
            extractor.extract_batch(*load_faces(data, rows, extractor.network.device)).cpu()
        )
        values.append(torch.from_numpy(np.asarray(data.vectors[rows][:, FACIAL_COLUMNS])))
    return fit_directions(torch.cat(latents), torch.cat(values))


def fit_directions(latents: Tensor, values: Tensor) -> Tensor:
    """Fit how latents change with each value while the others stay the same, in least squares.

    W+ Adapter's authors take directions of StyleGAN2's latent space from other work, which finds
    them without knowing the values. Here the values of the people are known.

    Args:
        latents: (N, 18, W).
        values: (N, V) from 0 to 1.

    Returns:
        (V, 18, W): the change of the latents when a value changes by `LARGEST_EDIT`.
    """
    x = (values - values.mean(0)).double()
    y = (latents - latents.mean(0)).flatten(1).double()
    slopes = torch.linalg.lstsq(x, y).solution
    return (LARGEST_EDIT * slopes).float().unflatten(1, latents.shape[1:])
