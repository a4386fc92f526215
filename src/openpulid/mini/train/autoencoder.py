"""Training of the miniature's autoencoder: 96 px images to 12 x 12 x 20 latents and back.

A small autoencoder loses the eyes first, so faces, and most of all eyes and mouths, have a higher
weight in its loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.faces.align import align_faces
from openpulid.faces.miniature import CROP
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.mini.data import batches, load_faces
from openpulid.mini.train.recognition import embed_crops, to_uint8
from openpulid.training import StepRNG
from openpulid.world import WorldDataset

CHANNELS = 20
"""Latent channels.

The best linear code of 16 channels has a PSNR of 26.4 dB, of 20 channels 27.4 dB, of 32 channels
30.0 dB. With 4 channels the eyes are blurred.
"""


def build_autoencoder(
    data: WorldDataset, channels: int = CHANNELS, size: int = 96, num_images: int = 2000
) -> PatchAutoencoderKL:
    """Build an autoencoder that starts as the best linear code of some images.

    Args:
        data: the dataset of these images.
        channels: latent channels.
        size: width and height of the images.
        num_images: number of images that the linear code is fitted to.
    """
    vae = PatchAutoencoderKL(latent_channels=channels, sample_size=size)
    rows = np.linspace(0, len(data) - 1, min(num_images, len(data))).astype(np.int64)
    vae.start_from(2 * torch.from_numpy(data.images[rows]).float() / 255 - 1)
    return vae


def pixel_weights(
    masks: Tensor, landmarks: Tensor, face: float = 2.0, feature: float = 5.0
) -> Tensor:
    """Compute loss weights per pixel, with mean 1.

    Args:
        masks: (B, 1, S, S), 1 on the face.
        landmarks: (B, 5, 2) pixels; the nose tip (index 2) has no additional weight.
        face: additional weight of the face; all pixels have weight 1.
        feature: additional weight of eyes and mouth.

    Returns:
        (B, 1, S, S) weights.
    """
    size = masks.shape[-1]
    axis = torch.arange(size, device=masks.device) + 0.5
    points = torch.cat([landmarks[:, :2], landmarks[:, 3:]], 1)
    x_squared = (axis - points[..., :1]) ** 2  # (B, 4, S)
    y_squared = (axis - points[..., 1:]) ** 2
    double_variance = 2 * (0.05 * size) ** 2
    squared_distance = x_squared[:, :, None] + y_squared[..., None]
    proximity = torch.exp(-squared_distance / double_variance).amax(1, keepdim=True)
    weight = 1 + masks * (face + feature * proximity)
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)


def image_distances(
    decoded: Tensor, images: Tensor, weight: Tensor, smooth: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Compute the weighted distances of images and of their gradients, two scalars.

    Args:
        decoded: (B, 3, S, S) reconstructed images.
        images: (B, 3, S, S) originals.
        weight: (B, 1, S, S) weights of the pixels.
        smooth: Charbonnier's constant, below which the distance of images is quadratic.
    """
    error = decoded.float() - images.float()
    right = (error[..., 1:] - error[..., :-1]) * weight[..., 1:]
    down = (error[..., 1:, :] - error[..., :-1, :]) * weight[..., 1:, :]
    pixels = (weight * (error.square() + smooth**2).sqrt()).mean()
    return pixels, right.abs().mean() + down.abs().mean()


class ReconstructionLoss(nn.Module):
    """Weighted distance of images and of their gradients, and the KL divergence of the latents.

    The distance of images is Charbonnier's. The gradients (differences of neighboring pixels) keep
    edges sharp. The small KL term limits the precision of the latents, so that small errors of a
    base model do little harm.

    Args:
        slopes: weight of the image gradients.
        kl: weight of the KL divergence from a standard normal distribution.
        smooth: Charbonnier's constant, below which the distance is quadratic.
    """

    def __init__(self, slopes: float = 0.5, kl: float = 2e-4, smooth: float = 0.01) -> None:
        super().__init__()
        self.slopes = slopes
        self.kl = kl
        self.smooth = smooth

    def forward(
        self, decoded: Tensor, images: Tensor, weight: Tensor, mean: Tensor, logvar: Tensor
    ) -> dict[str, Tensor]:
        """Compute the named losses, scalars.

        Args:
            decoded: (B, 3, S, S) reconstructed images.
            images: (B, 3, S, S) originals.
            weight: (B, 1, S, S) weights of the pixels.
            mean: (B, C, s, s) mean of the latents.
            logvar: (B, C, s, s) logarithm of their variance.
        """
        pixels, slopes = image_distances(decoded, images, weight, self.smooth)
        mean = mean.float()
        logvar = logvar.float()
        return {
            "pixels": pixels,
            "slopes": self.slopes * slopes,
            "kl": self.kl * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
        }


class AutoencoderTask:
    """Trains the autoencoder; a `training.trainer.Task`.

    Args:
        vae: from `build_autoencoder`.
        data: training images.
        held_out: images of held-out people; None disables validation.
        batch: images per step; small, because many steps help more than precise gradients.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        data: WorldDataset,
        held_out: WorldDataset | None = None,
        batch: int = 8,
    ) -> None:
        self.vae = vae.to(memory_format=torch.channels_last)
        self.data = data
        self.held_out = held_out
        self.batch = batch
        self.loss = ReconstructionLoss()

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the autoencoder."""
        return {"vae": self.vae}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the reconstruction losses of a random batch."""
        rows = rng.indices(len(self.data), self.batch).numpy()
        images, masks, landmarks = load_faces(self.data, rows, self.vae.device)
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        latents = self.vae.encode(images).latent_dist
        noise = rng.randn(latents.mean.shape, "latents").to(latents.mean)
        decoded = self.vae.decode(latents.mean + latents.std * noise).sample
        weight = pixel_weights(masks, landmarks)
        return self.loss(decoded, images, weight, latents.mean, latents.logvar)

    def validate(self) -> Mapping[str, float]:
        """Measure the PSNR on held-out images."""
        return measure_psnr(self.vae, self.held_out, max_images=512) if self.held_out else {}

    def sheet(self) -> Image.Image | None:
        """Draw held-out images, each row above its reconstructions."""
        data = self.held_out or self.data
        rows = np.linspace(0, len(data) - 1, 24).astype(np.int64)
        images, _, _ = load_faces(data, rows, self.vae.device)
        originals = to_pil(images)
        reconstructions = to_pil(reconstruct(self.vae, images))
        grid = []
        for start in (0, 8, 16):
            grid.append(originals[start : start + 8])
            grid.append(reconstructions[start : start + 8])
        return image_grid(grid, 192)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode and decode images (B, 3, S, S) in [0, 1]; return the reconstructions in [0, 1]."""
    latents = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode()
    return (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def measure_psnr(
    vae: AutoencoderKL, data: WorldDataset, max_images: int = 2048
) -> dict[str, float]:
    """Measure the mean PSNR of reconstructions in dB.

    Args:
        vae: the autoencoder.
        data: the dataset.
        max_images: maximum number of images, spread evenly over the dataset.

    Returns:
        `psnr` of the image, and `psnr_face` of the pixels of the face alone.
    """
    image_errors = []
    face_errors = []
    for rows in batches(len(data), max_images):
        images, masks, _ = load_faces(data, rows, vae.device)
        error = (reconstruct(vae, images) - images).square().mean(1, keepdim=True)
        image_errors.append(error.mean((1, 2, 3)))
        face_errors.append((error * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)).clamp(min=1))
    return {"psnr": _mean_psnr(image_errors), "psnr_face": _mean_psnr(face_errors)}


def _mean_psnr(errors: list[Tensor]) -> float:
    """Return the mean PSNR in dB of batches (B,) of mean squared errors."""
    return (-10 * torch.cat(errors).clamp(min=1e-10).log10().mean()).item()


def measure_face_similarity(
    vae: AutoencoderKL, scorer: nn.Module, data: WorldDataset, max_images: int = 512
) -> float:
    """Measure the cosine of the scorer's embeddings of faces and of their reconstructions.

    Args:
        vae: the autoencoder.
        scorer: a face recognition model.
        data: images of held-out people.
        max_images: maximum number of images to use.
    """
    crops: list[Tensor] = []
    reconstructed_crops: list[Tensor] = []
    for rows in batches(len(data), max_images):
        images, masks, landmarks = load_faces(data, rows, vae.device)
        for target, pixels in ((crops, images), (reconstructed_crops, reconstruct(vae, images))):
            target.append(to_uint8(align_faces(pixels, masks, landmarks, CROP)))
    embeddings = embed_crops(scorer, torch.cat(crops))
    reconstructions = embed_crops(scorer, torch.cat(reconstructed_crops))
    return (embeddings * reconstructions).sum(-1).mean().item()


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, data: WorldDataset, max_images: int | None = None) -> Tensor:
    """Encode images of a dataset under the caller's autocast.

    Args:
        vae: the autoencoder.
        data: the dataset.
        max_images: maximum number of images, spread evenly over the dataset; all by default.

    Returns:
        (N, C, s, s) float32 means of the latents, on the CPU.
    """
    parts = []
    for rows in batches(len(data), max_images or len(data)):
        images, _, _ = load_faces(data, rows, vae.device)
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        parts.append(vae.encode(images).latent_dist.mode().float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def set_scaling_factor(
    vae: AutoencoderKL, data: WorldDataset, max_images: int = 4096
) -> AutoencoderKL:
    """Set the scaling factor, in place, so that scaled latents of `data` have mean square 1."""
    latents = encode_dataset(vae, data, max_images)
    vae.register_to_config(scaling_factor=1 / latents.square().mean().sqrt().item())
    return vae
