"""The e4e encoder (arXiv 2102.02766): a face -> a StyleGAN2 latent for each of its 18 layers.

The trunk is facexlib's IR-SE-50, which has the names of the published file.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from openpulid.errors import explain_missing_library
from openpulid.io.checkpoints import explain_bad_weights, load_state, read_tensors

SIDE = 256
"""Width and height of the input in pixels."""

WIDTH = 512
"""Of a latent."""

NUM_LATENTS = 18
MIDDLE, FINE = 3, 7
"""First latent that is read from the middle and from the finest feature map."""

TAPS = (6, 20, 23)
"""Blocks of the trunk after which 128, 256 and 512 channels are read."""


class EqualLinear(nn.Module):
    """A linear layer whose weights are scaled by its fan-in when it runs, as in StyleGAN2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width) to (B, width)."""
        return linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class StyleBlock(nn.Module):
    """A feature map -> one latent: convolutions of stride 2 until one position is left.

    Args:
        side: of the feature map, a power of two.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(side.bit_length() - 1):
            layers += [nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.LeakyReLU()]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, 512, side, side) to (B, 512)."""
        return self.linear(self.convs(features).flatten(1))


class E4E(nn.Module):
    """The encoder, under the names of the published file.

    Attributes:
        latent_avg: (18, 512) or (512,), the mean latent of the generator, which is added; without a
            file there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        with explain_missing_library():
            from facexlib.recognition.arcface_arch import bottleneck_IR_SE, get_blocks

        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        blocks = [block for group in get_blocks(50) for block in group]
        self.body = nn.Sequential(*(bottleneck_IR_SE(*block) for block in blocks))
        sides = [16] * MIDDLE + [32] * (FINE - MIDDLE) + [64] * (NUM_LATENTS - FINE)
        self.styles = nn.ModuleList([StyleBlock(side) for side in sides])
        self.latlayer1 = nn.Conv2d(256, WIDTH, 1)
        self.latlayer2 = nn.Conv2d(128, WIDTH, 1)
        self.latent_avg: Tensor | None = None

    @classmethod
    def load(cls, file: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> E4E:
        """Load the encoder of `e4e_ffhq_encode.pt`; the file's generator is not read.

        Raises:
            WeightsError: the file is missing or damaged, or holds another network.
        """
        with init_empty_weights(include_buffers=False):
            encoder = cls()
        state = read_tensors(file, dtype, prefix="encoder.")
        weights = {name.removeprefix("encoder."): x for name, x in state.items()}
        message = f"{file} is not the e4e encoder"
        load_state(encoder, weights, message, assign=True)
        with explain_bad_weights(message):
            encoder.latent_avg = read_tensors(file, dtype, prefix="latent_avg")["latent_avg"]
        return encoder.eval().requires_grad_(False)

    def forward(self, faces: Tensor) -> Tensor:
        """Encode faces.

        Args:
            faces: (B, 3, 256, 256) in [-1, 1], FFHQ-aligned, on white.

        Returns:
            (B, 18, 512).
        """
        x = self.input_layer(faces)
        taps = []
        for index, block in enumerate(self.body):
            x = block(x)
            if index in TAPS:
                taps.append(x)
        fine, middle, coarse = taps
        maps = [coarse, _add_upsampled(coarse, self.latlayer1(middle))]
        maps.append(_add_upsampled(maps[1], self.latlayer2(fine)))
        base = self.styles[0](coarse)
        latents = [base]
        for index, style in enumerate(self.styles[1:], 1):
            level = (index >= MIDDLE) + (index >= FINE)
            latents.append(base + style(maps[level]))
        codes = torch.stack(latents, 1)
        return codes if self.latent_avg is None else codes + self.latent_avg.to(codes)


def _add_upsampled(coarse: Tensor, fine: Any) -> Tensor:
    """Enlarge a feature map to the size of another, and add that."""
    size = fine.shape[-2:]
    upsampled = interpolate(coarse, size=size, mode="bilinear", align_corners=True)
    return upsampled + fine
