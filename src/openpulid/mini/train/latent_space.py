"""Move a trained U-Net to the latents of another autoencoder, so that its training can continue.

The latents of two autoencoders with the same patches are almost linear functions of each other. The
maps between them are 1 x 1 convolutions, which fold into the U-Net's first and last layers. The
noise is mapped, too, and is then not quite white. Training removes what is left of the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.io.checkpoints import module_fingerprint
from openpulid.mini.data import load_faces
from openpulid.mini.train.build_context import BuildContext

NUM_FITTED = 2048
"""Images to which the maps between two latent spaces are fitted."""


@dataclass(frozen=True)
class LinearMap:
    """y = weight x + bias at every position of a latent.

    Attributes:
        weight: (D, C).
        bias: (D,).
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> LinearMap:
        """Fit a map by least squares.

        Args:
            x: (N, C, h, w) latents.
            y: (N, D, h, w) latents of the same images.
        """
        inputs, targets = (latents.double().movedim(1, -1).flatten(0, -2) for latents in (x, y))
        solution = torch.linalg.lstsq(inputs - inputs.mean(0), targets - targets.mean(0)).solution
        weight = solution.T
        bias = targets.mean(0) - weight @ inputs.mean(0)
        return cls(weight.float(), bias.float())


@torch.no_grad()
def move_unet(
    unet: UNet2DConditionModel, old: PatchAutoencoderKL, new: PatchAutoencoderKL, images: Tensor
) -> None:
    """Change the first and the last layer of a U-Net from one latent space to another, in place.

    The biases of the maps are left out. They would be exact for an image without noise only, and
    both spaces have a mean near zero.

    Args:
        unet: predicts the velocity in the latents of `old`.
        old: the autoencoder on whose latents the U-Net was trained.
        new: the autoencoder on whose latents it will be trained.
        images: (N, 3, H, W) in [-1, 1], some thousand for a good fit.
    """
    old_latents, new_latents = encode(old, images), encode(new, images)
    to_old = LinearMap.fit(new_latents, old_latents)
    to_new = LinearMap.fit(old_latents, new_latents)
    first: Any = unet.conv_in
    last: Any = unet.conv_out
    first.weight.copy_(torch.einsum("oikl,ij->ojkl", first.weight, to_old.weight.to(first.weight)))
    last.weight.copy_(torch.einsum("oikl,po->pikl", last.weight, to_new.weight.to(last.weight)))
    last.bias.copy_(to_new.weight.to(last.bias) @ last.bias)


def encode(vae: PatchAutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """Return the scaled latents (N, C, h, w) of images (N, 3, H, W) in [-1, 1]."""
    latents = [vae.encode(part).latent_dist.mode() for part in images.split(batch)]
    return torch.cat(latents) * vae.config.scaling_factor


def load_first_unet(context: BuildContext, vae: PatchAutoencoderKL) -> UNet2DConditionModel:
    """Load the U-Net of the pipeline in `context.begin`, moved to the latents of `vae`.

    Raises:
        WeightsError: the folder holds no pipeline of the miniature.
    """
    unet = context.load_first_model(UNet2DConditionModel, "unet").requires_grad_(True)
    first_vae = context.load_first_model(PatchAutoencoderKL, "vae")
    if module_fingerprint(first_vae) != module_fingerprint(vae):
        rows = np.linspace(0, len(context.data) - 1, NUM_FITTED, dtype=int)
        images, _, _ = load_faces(context.data, rows, context.device)
        move_unet(unet, first_vae, vae, 2 * images - 1)
    return unet
