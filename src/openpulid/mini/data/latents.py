"""Latents of a dataset's images, encoded once for the base model, its student and the adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pixel_shuffle, pixel_unshuffle

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.io.checkpoints import module_fingerprint
from openpulid.mini.data.cache import ArrayCache
from openpulid.mini.data.loading import load_faces
from openpulid.mini.data.pairs import PairDataset
from openpulid.world import WorldDataset


class Latents:
    """Latents and face masks of N images.

    Attributes:
        images: (N, C, h, w) float16, scaled as the base model sees them.
        face_masks: (N, 1, h, w) float16, the share of face pixels at each position.
    """

    def __init__(self, images: Tensor, face_masks: Tensor) -> None:
        self.images = images
        self.face_masks = face_masks

    @classmethod
    def build(
        cls,
        vae: PatchAutoencoderKL,
        data: WorldDataset | PairDataset,
        folder: Path,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Latents:
        """Encode a dataset, or load its latents if they are cached.

        The cache has one latent per patch, so that bases with another `latent_patch` share it.

        Args:
            vae: the autoencoder.
            data: the dataset.
            folder: folder of the cache.
            on_progress: called with the number of images done and their total.
        """
        key = {
            **data.key,
            "vae": module_fingerprint(vae),
            "scaling_factor": vae.config.scaling_factor,
        }
        cache = ArrayCache(folder, key, len(data))
        cache.fill(lambda rows: _encode(vae, data, rows), on_progress=on_progress)
        latents = cls(
            torch.from_numpy(cache.load("images")), torch.from_numpy(cache.load("face_masks"))
        )
        return latents.arrange(vae.config.latent_patch)

    def arrange(self, latent_patch: int) -> Latents:
        """Return latents of one per patch in squares of this side, see `PatchAutoencoderKL`."""
        if latent_patch == 1:
            return self
        masks = interpolate(self.face_masks, scale_factor=latent_patch)
        return Latents(pixel_shuffle(self.images, latent_patch), masks)

    @classmethod
    def concatenate(cls, parts: Sequence[Latents]) -> Latents:
        """Join the latents of several datasets."""
        images = torch.cat([part.images for part in parts])
        return cls(images, torch.cat([part.face_masks for part in parts]))

    def rows(self, rows: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return latents (B, C, h, w) and face masks (B, 1, h, w) of some rows in float32."""
        images = self.images[rows].to(device).float()
        return images, self.face_masks[rows].to(device).float()


@torch.no_grad()
def _encode(
    vae: PatchAutoencoderKL, data: WorldDataset | PairDataset, rows: np.ndarray
) -> dict[str, np.ndarray]:
    if isinstance(data, PairDataset):
        images, masks = data.load(rows, vae.device)
    else:
        images, masks, _ = load_faces(data, rows, vae.device)
    images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
    latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    latents = pixel_unshuffle(latents, vae.config.latent_patch)
    face_masks = avg_pool2d(masks, images.shape[-1] // latents.shape[-1])
    return {
        "images": latents.to("cpu", torch.float16).contiguous().numpy(),
        "face_masks": face_masks.to("cpu", torch.float16).numpy(),
    }
