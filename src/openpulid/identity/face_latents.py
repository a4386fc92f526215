"""The miniature's face latents: 18 latents of a generator for each face, as e4e's of StyleGAN2.

Shapes: B faces, W width of a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from openpulid.faces.miniature import CROP, ResidualBlock, convolution

LATENT_GROUPS = (4, 4, 4, 6)
"""Latents for each resolution of the generator, the coarsest first. W+ Adapter makes a token of
each group."""

NUM_LATENTS = sum(LATENT_GROUPS)

HEAD_SIDE = 4
"""Side of the feature maps that become latents."""


class FaceLatentEncoder(nn.Module):
    """Maps faces on white to latents, in the form of e4e (arXiv 2102.02766, section 4.1).

    A first latent is the same for all layers of the generator, and an offset is added to it in each
    further one. Coarse latents are read from the deepest feature map, fine ones from maps of higher
    resolution. The first latent is normalized over the training images, so that a penalty on the
    offsets cannot be met by a small scale of all latents.

    Args:
        latent: W.
        stem: channels at half the resolution.
        widths: channels at a quarter, an eighth and a sixteenth of it.
        head: channels of the feature maps that become latents.
    """

    config: dict[str, Any]

    def __init__(
        self,
        latent: int = 32,
        stem: int = 24,
        widths: Sequence[int] = (48, 64, 80),
        head: int = 12,
    ) -> None:
        super().__init__()
        self.config = {"latent": latent, "stem": stem, "widths": list(widths), "head": head}
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), convolution(12, stem), nn.ReLU())
        blocks = []
        reductions = []
        channels = stem
        for level, width in enumerate(widths):
            blocks.append(ResidualBlock(channels, width, 2))
            stride = (CROP >> (level + 2)) // HEAD_SIDE
            reductions.append(
                nn.Sequential(
                    nn.Conv2d(width, head, stride, stride, bias=False), nn.BatchNorm2d(head)
                )
            )
            channels = width
        self.blocks = nn.ModuleList(blocks)
        self.reductions = nn.ModuleList(reversed(reductions))
        features = head * HEAD_SIDE**2
        coarse, middle, fine = LATENT_GROUPS[0], LATENT_GROUPS[1], sum(LATENT_GROUPS[2:])
        self.first = nn.Sequential(
            nn.Linear(features, latent, bias=False), nn.BatchNorm1d(latent, affine=False)
        )
        counts = (coarse - 1, middle, fine)
        self.offsets = nn.ModuleList(nn.Linear(features, count * latent) for count in counts)
        for layer in self.offsets:
            nn.init.zeros_(layer.get_parameter("weight"))
            nn.init.zeros_(layer.get_parameter("bias"))

    @property
    def width(self) -> int:
        """W."""
        return int(self.config["latent"])

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def forward(self, faces: Tensor) -> Tensor:
        """Encode faces.

        Args:
            faces: (B, 3, 64, 64) in [0, 1], aligned, on white.

        Returns:
            (B, 18, W) in float32.
        """
        first, offsets = self.encode_parts(faces)
        return torch.cat([first, first + offsets], 1)

    def encode_parts(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first latent (B, 1, W) and the offsets of the others (B, 17, W)."""
        x = self.stem(2 * faces - 1)
        maps: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            maps.insert(0, x)
        features = [
            relu(reduction(level)).flatten(1)
            for reduction, level in zip(self.reductions, maps, strict=True)
        ]
        first = self.first(features[0])[:, None].float()
        offsets = [
            layer(level).unflatten(1, (-1, self.width)).float()
            for layer, level in zip(self.offsets, features, strict=True)
        ]
        return first, torch.cat(offsets, 1)
