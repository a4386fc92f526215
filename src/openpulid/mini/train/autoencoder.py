"""Training of the miniature's autoencoder: 96 px pictures to 12 x 12 x 20 latents and back.

Eyes are what a small autoencoder loses first, so faces, and most of all eyes and mouths, weigh more in its loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.mini.train.recognition import faces_of
from openpulid.training.rng import StepRNG
from openpulid.world.dataset import WorldDataset

CHANNELS = 20
"""Of the latents. The best linear code of 16 gives 26.4 dB, of 20 27.4, of 32 30.0; with 4 eyes blur away."""


def build_autoencoder(
    data: WorldDataset, channels: int = CHANNELS, size: int = 96, pictures: int = 2000
) -> PatchAutoencoderKL:
    """An autoencoder that begins as the best linear code of some pictures of `data`."""
    vae = PatchAutoencoderKL(latent_channels=channels, sample_size=size)
    rows = np.linspace(0, len(data) - 1, min(pictures, len(data))).astype(np.int64)
    vae.start_from(2 * torch.from_numpy(data.images[rows]).float() / 255 - 1)
    return vae


def importance(masks: Tensor, landmarks: Tensor, face: float = 2.0, feature: float = 5.0) -> Tensor:
    """(B, 1, S, S) weights of mean 1: everything weighs 1, the face `face` more, eyes and mouth `feature` more.

    Args:
        masks: (B, 1, S, S), one on the face.
        landmarks: (B, 5, 2) pixels; the nose tip, number 2, needs no special care.
    """
    size = masks.shape[-1]
    axis = torch.arange(size, device=masks.device) + 0.5
    points = torch.cat([landmarks[:, :2], landmarks[:, 3:]], 1)
    x, y = (axis - points[..., :1]) ** 2, (axis - points[..., 1:]) ** 2  # (B, 4, S)
    reach = 2 * (0.05 * size) ** 2
    near = torch.exp(-(x[:, :, None] + y[..., None]) / reach).amax(1, keepdim=True)
    weight = 1 + masks * (face + feature * near)
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)


class ReconstructionLoss(nn.Module):
    """Weighted Charbonnier distance of pictures and of their slopes, and the latents' distance from a normal distribution.

    The slopes (differences of neighbours) keep edges sharp; the last term is tiny and only limits what a latent can say
    exactly, so that a base model's small errors do little harm.
    """

    def __init__(self, slopes: float = 0.5, kl: float = 2e-4, smooth: float = 0.01) -> None:
        super().__init__()
        self.slopes, self.kl, self.smooth = slopes, kl, smooth

    def forward(
        self, decoded: Tensor, images: Tensor, weight: Tensor, mean: Tensor, logvar: Tensor
    ) -> dict[str, Tensor]:
        """Named scalars for (B, 3, S, S) pictures, (B, 1, S, S) weights and the latents' (B, C, s, s) distribution."""
        error = decoded.float() - images.float()
        right = (error[..., 1:] - error[..., :-1]) * weight[..., 1:]
        down = (error[..., 1:, :] - error[..., :-1, :]) * weight[..., 1:, :]
        mean, logvar = mean.float(), logvar.float()
        return {
            "pixels": (weight * (error.square() + self.smooth**2).sqrt()).mean(),
            "slopes": self.slopes * (right.abs().mean() + down.abs().mean()),
            "kl": self.kl * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
        }


class AutoencoderTask:
    """Trains the autoencoder; a `training.loop.Task`.

    Args:
        vae: from `build_autoencoder`.
        data, held_out: pictures of training people and of others.
        batch: small, since many steps matter more than smooth ones.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        data: WorldDataset,
        held_out: WorldDataset | None = None,
        batch: int = 8,
    ) -> None:
        self.vae = vae.to(memory_format=torch.channels_last)
        self.data, self.held_out, self.batch = data, held_out, batch
        self.loss = ReconstructionLoss()

    def modules(self) -> Mapping[str, nn.Module]:
        return {"vae": self.vae}

    def losses(self, draw: StepRNG) -> Mapping[str, Tensor]:
        rows = draw.indices(len(self.data), self.batch).numpy()
        images, masks, landmarks = faces_of(self.data, rows, self.vae.device)
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        latents = self.vae.encode(images).latent_dist
        noise = draw.randn(latents.mean.shape, "latents").to(latents.mean)
        decoded = self.vae.decode(latents.mean + latents.std * noise).sample
        return self.loss(
            decoded, images, importance(masks, landmarks), latents.mean, latents.logvar
        )

    def validate(self) -> Mapping[str, float]:
        return figures(self.vae, self.held_out, most=512) if self.held_out else {}

    def sheet(self) -> Image.Image | None:
        """Held-out pictures above what comes back."""
        data = self.held_out or self.data
        rows = np.linspace(0, len(data) - 1, 24).astype(np.int64)
        images, _, _ = faces_of(data, rows, self.vae.device)
        before, after = to_pil(images), to_pil(there_and_back(self.vae, images))
        return image_grid(
            [side[start : start + 8] for start in (0, 8, 16) for side in (before, after)], 192
        )


@torch.no_grad()
def there_and_back(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> encoded and decoded, in [0, 1]."""
    latents = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode()
    return (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def figures(vae: AutoencoderKL, data: WorldDataset, most: int = 2048) -> dict[str, float]:
    """`psnr` and, on the face's pixels alone, `psnr_face`, in dB, means over up to `most` pictures of `data`."""
    whole, inside = [], []
    for rows in batches(len(data), most):
        images, masks, _ = faces_of(data, rows, vae.device)
        error = (there_and_back(vae, images) - images).square().mean(1, keepdim=True)
        whole.append(error.mean((1, 2, 3)))
        inside.append((error * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)).clamp(min=1))
    psnr, face = (
        -10 * torch.cat(errors).clamp(min=1e-10).log10().mean() for errors in (whole, inside)
    )
    return {"psnr": psnr.item(), "psnr_face": face.item()}


def batches(count: int, most: int, size: int = 64) -> list[np.ndarray]:
    """Up to `most` row numbers below `count`, spread evenly, in pieces of `size`."""
    rows = np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def encoded(vae: AutoencoderKL, data: WorldDataset, most: int | None = None) -> Tensor:
    """(N, C, s, s) float32 latents (the means) of up to `most` pictures, on the CPU; under the caller's autocast."""
    parts = []
    for rows in batches(len(data), most or len(data)):
        images, _, _ = faces_of(data, rows, vae.device)
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        parts.append(vae.encode(images).latent_dist.mode().float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def standardised(vae: AutoencoderKL, data: WorldDataset, most: int = 4096) -> AutoencoderKL:
    """Sets the scaling factor, in place: scaled latents of `data` have mean square 1."""
    latents = encoded(vae, data, most)
    vae.register_to_config(scaling_factor=1 / latents.square().mean().sqrt().item())
    return vae
