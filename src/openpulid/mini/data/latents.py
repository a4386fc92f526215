"""The pictures of a data set as latents, encoded once and kept: the base, its student and the adapter learn from these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from openpulid.mini.train.autoencoder import PatchAutoencoderKL, batches
from openpulid.mini.train.recognition import faces_of
from openpulid.world.dataset import WorldDataset


class Latents:
    """pictures: (N, C, s, s) float16, scaled as a base sees them; faces: (N, 1, s, s) float16, the face's share of each."""

    def __init__(self, pictures: Tensor, faces: Tensor) -> None:
        self.pictures, self.faces = pictures, faces

    @classmethod
    def of(
        cls,
        vae: PatchAutoencoderKL,
        data: WorldDataset,
        folder: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Latents:
        """Encodes everything, or reads what lies in `folder` from an earlier run with the same autoencoder."""
        mark = f"{fingerprint(vae)} {vae.config.scaling_factor:.6f}"
        if (
            folder is not None
            and (folder / "mark.txt").exists()
            and (folder / "mark.txt").read_text() == f"{mark} {len(data)}"
        ):
            return cls(
                *(
                    torch.from_numpy(np.load(folder / f"{name}.npy"))
                    for name in ("pictures", "faces")
                )
            )
        latents = cls(*_encode(vae, data, on_progress or (lambda done, total: None)))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / "pictures.npy", latents.images.numpy())
            np.save(folder / "faces.npy", latents.faces.numpy())
            (folder / "mark.txt").write_text(f"{mark} {len(data)}")
        return latents

    @classmethod
    def joined(cls, several: Sequence[Latents]) -> Latents:
        return cls(
            torch.cat([some.pictures for some in several]),
            torch.cat([some.faces for some in several]),
        )

    def rows(self, rows: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Float32 latents (B, C, s, s) and faces (B, 1, s, s) of some rows."""
        return self.pictures[rows].to(device).float(), self.faces[rows].to(device).float()


@torch.no_grad()
def _encode(
    vae: PatchAutoencoderKL, data: WorldDataset, on_progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    pictures, faces = [], []
    for rows in batches(len(data), len(data)):
        images, masks, _ = faces_of(data, rows, vae.device)
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        pictures.append(latents.to("cpu", torch.float16, memory_format=torch.contiguous_format))
        faces.append(
            avg_pool2d(masks, images.shape[-1] // latents.shape[-1]).to("cpu", torch.float16)
        )
        on_progress(int(rows[-1]) + 1, len(data))
    with torch.autocast(
        vae.device.type, enabled=False
    ):  # on a CPU it knows bfloat16 only, and these are float16
        return torch.cat(pictures), torch.cat(faces)


def fingerprint(model: nn.Module) -> str:
    """Tells models with different weights apart."""
    return f"{sum(parameter.double().abs().sum().item() for parameter in model.parameters()):.6f}"
