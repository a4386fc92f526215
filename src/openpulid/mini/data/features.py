"""The faces of a data set as the identity encoder gets them, read once and kept: what the adapters learn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from openpulid.identity.extractor import MiniExtractor
from openpulid.mini.data.latents import fingerprint
from openpulid.mini.train.autoencoder import batches
from openpulid.mini.train.recognition import faces_of
from openpulid.world.dataset import WorldDataset


class FaceFeatures:
    """id_cond: (N, C) float32; hidden: (N, five levels, 1 + patches, D) float16, on disk."""

    def __init__(self, id_cond: np.ndarray, hidden: np.ndarray) -> None:
        self.id_cond, self.hidden = id_cond, hidden

    @classmethod
    def of(
        cls,
        extractor: MiniExtractor,
        data: WorldDataset,
        folder: Path,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> FaceFeatures:
        """Reads every face through its exact mask and landmarks, or what lies in `folder` from the same networks."""
        mark = f"{fingerprint(extractor.recognition)} {fingerprint(extractor.vision_encoder)} {len(data)}"
        if not (folder / "mark.txt").exists() or (folder / "mark.txt").read_text() != mark:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "mark.txt").unlink(missing_ok=True)
            _read(extractor, data, folder, on_progress or (lambda done, total: None))
            (folder / "mark.txt").write_text(mark)
        return cls(np.load(folder / "id_cond.npy"), np.load(folder / "hidden.npy", mmap_mode="r"))

    def rows(
        self, rows: np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, list[Tensor]]:
        """id_cond (B, C) and five hidden levels (B, 1 + patches, D), float32, of some rows."""
        hidden = torch.from_numpy(self.hidden[rows]).to(device).float()
        return torch.from_numpy(self.id_cond[rows]).to(device), list(hidden.unbind(1))


@torch.no_grad()
def _read(
    extractor: MiniExtractor,
    data: WorldDataset,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    files: dict[str, np.ndarray] = {}
    for rows in batches(len(data), len(data)):
        id_cond, levels = extractor.extract_batch(*faces_of(data, rows, extractor.device))
        read = {
            "id_cond": id_cond.float().cpu().numpy(),
            "hidden": torch.stack(levels, 1).half().cpu().numpy(),
        }
        for name, values in read.items():
            if name not in files:
                files[name] = open_memmap(
                    folder / f"{name}.npy", "w+", values.dtype, (len(data), *values.shape[1:])
                )
            files[name][rows] = values
        on_progress(int(rows[-1]) + 1, len(data))
