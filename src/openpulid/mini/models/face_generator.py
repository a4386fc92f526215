"""A small generator of faces from 18 latents, with the layers of StyleGAN2 (arXiv 1912.04958)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, leaky_relu, pixel_shuffle

from openpulid.identity.face_latents import LATENT_GROUPS

FIRST_SIDE = 4
"""Side of the constant that generation begins with."""


class ModulatedConv(nn.Module):
    """A 3 x 3 convolution whose input channels a latent scales (section 2.2).

    The output is divided by its expected standard deviation (demodulation, equation 3). Scaling
    inputs and outputs gives the same result as a kernel for each image, and is faster on a CPU.

    Args:
        channels_in, channels: of input and output.
        latent: W.
    """

    def __init__(self, channels_in: int, channels: int, latent: int) -> None:
        super().__init__()
        # demodulation ignores the scale, but the step of an optimizer is relative to it
        scale = (9 * channels_in) ** -0.5
        self.weight = nn.Parameter(scale * torch.randn(channels, channels_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scale = nn.Linear(latent, channels_in)
        nn.init.ones_(self.scale.bias)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """Map (B, C, s, s) and latents (B, W) to (B, D, s, s)."""
        scale = self.scale(latent).float()
        power = self.weight.square().sum((2, 3))
        norm = (scale.square() @ power.T + 1e-8).rsqrt()
        y = conv2d(x * scale[..., None, None].to(x), self.weight, padding=1)
        bias = self.bias[:, None, None].to(y)
        return leaky_relu(torch.addcmul(bias, y, norm[..., None, None].to(y)), 0.2, inplace=True)


class FaceGenerator(nn.Module):
    """Generates faces on white from latents. It is the decoder of an autoencoder, and no GAN.

    As in StyleGAN2, it begins with a constant, and each layer is modulated by a latent. Layers are
    residual but for the first one of a resolution. There is no noise: the image depends on the
    latents alone.

    Args:
        latent: W.
        widths: channels at 4, 8, 16 and 32 pixels.
    """

    config: dict[str, Any]

    def __init__(self, latent: int = 32, widths: Sequence[int] = (64, 64, 48, 32)) -> None:
        super().__init__()
        self.config = {"latent": latent, "widths": list(widths)}
        self.constant = nn.Parameter(torch.randn(1, widths[0], FIRST_SIDE, FIRST_SIDE))
        layers = []
        channels = widths[0]
        for width, count in zip(widths, LATENT_GROUPS, strict=True):
            for _ in range(count):
                layers.append(ModulatedConv(channels, width, latent))
                channels = width
        self.layers = nn.ModuleList(layers)
        self.output = nn.Conv2d(channels, 12, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, 18, W) to images (B, 3, 64, 64), about -1 to 1."""
        x = self.constant.expand(len(latents), -1, -1, -1)
        layers = iter(zip(self.layers, latents.unbind(1), strict=True))
        for level, count in enumerate(LATENT_GROUPS):
            if level > 0:
                x = interpolate(x, scale_factor=2, mode="bilinear")
            for index in range(count):
                layer, latent = next(layers)
                y = layer(x, latent)
                # the variance stays the same, because the activation halves that of y
                x = torch.add(y, x, alpha=0.5**0.5) if index else y
        return pixel_shuffle(self.output(x), 2).float()
