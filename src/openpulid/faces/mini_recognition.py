"""Three small face recognisers of different architecture behind one signature.

Each takes (B, 3, 64, 64) aligned crops in [0, 1] with everything but the face gray (`faces.align.aligned`) and gives
(B, dim) raw embeddings; compare them by their cosine. The encoder's, the ID loss's and the benchmark's must be
different networks, or the one that teaches would also be the one that judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

CROP = 64
"""Width and height of the crops in pixels."""


def convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.BatchNorm2d(channels_out)
    )


class _Head(nn.Sequential):
    """Where a feature sits says which feature it is, so the map is flattened, not pooled (ArcFace's head E)."""

    def __init__(self, channels: int, side: int, dim: int) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(channels * side * side, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),
        )


class _Residual(nn.Module):
    """The improved residual block of ArcFace (Deng et al. 2019): normalised before, between and after.

    Plain rectifiers: a slope per channel costs more time on a CPU than the convolutions.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            convolution(channels_in, channels, stride),
            nn.ReLU(),
            convolution(channels, channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride),
                nn.Conv2d(channels_in, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class ResNetRecognition(nn.Module):
    """Residual network; the identity encoder's. forward: (B, 3, 64, 64) -> (B, dim)."""

    config: dict[str, Any]

    def __init__(
        self,
        stem: int = 24,
        widths: Sequence[int] = (48, 96, 128),
        depths: Sequence[int] = (2, 2, 1),
        dim: int = 128,
    ) -> None:
        super().__init__()
        self.config = {"stem": stem, "widths": list(widths), "depths": list(depths), "dim": dim}
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), convolution(12, stem), nn.ReLU())
        blocks, before = [], stem
        for width, depth in zip(widths, depths, strict=True):
            for index in range(depth):
                blocks.append(_Residual(before, width, 1 if index else 2))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = _Head(before, CROP >> (len(widths) + 1), dim)

    def forward(self, crops: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(2 * crops - 1))).float()


class _ConvNeXtBlock(nn.Module):
    """Depthwise convolution, normalisation and a two-layer perceptron per pixel (Liu et al. 2022)."""

    def __init__(self, channels: int, kernel: int, expansion: int = 3) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.perceptron = nn.Sequential(
            nn.Linear(channels, expansion * channels),
            nn.ReLU(),
            nn.Linear(expansion * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(
            0, 2, 3, 1
        )  # pixels before channels: the perceptron is a plain matrix product
        return x + self.perceptron(self.norm(y)).permute(0, 3, 1, 2)


class ConvNeXtRecognition(nn.Module):
    """Patches of 4x4 pixels and ConvNeXt blocks; the ID loss's. forward: (B, 3, 64, 64) -> (B, dim)."""

    config: dict[str, Any]

    def __init__(
        self,
        widths: Sequence[int] = (64, 96, 144),
        depths: Sequence[int] = (2, 3, 1),
        kernels: Sequence[int] = (3, 3, 3),
        dim: int = 128,
    ) -> None:
        super().__init__()
        self.config = {
            "widths": list(widths),
            "depths": list(depths),
            "kernels": list(kernels),
            "dim": dim,
        }
        # Patches that do not overlap lose what lies across their borders, and an iris is two pixels wide.
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), convolution(48, widths[0]))
        layers: list[nn.Module] = []
        for stage, (width, depth, kernel) in enumerate(zip(widths, depths, kernels, strict=True)):
            if stage:
                layers.append(nn.Conv2d(widths[stage - 1], width, 2, 2))
            layers += [_ConvNeXtBlock(width, kernel) for _ in range(depth)]
        self.blocks = nn.Sequential(*layers)
        self.head = _Head(widths[-1], CROP >> (len(widths) + 1), dim)

    def forward(self, crops: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(2 * crops - 1))).float()


class VGGRecognition(nn.Module):
    """Plain convolutions and maximum pooling (Parkhi et al. 2015); the judge's. forward: (B, 3, 64, 64) -> (B, dim)."""

    config: dict[str, Any]

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 96, 128),
        depths: Sequence[int] = (1, 3, 3, 2),
        dim: int = 128,
    ) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "depths": list(depths), "dim": dim}
        layers: list[nn.Module] = []
        before = 3
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                # the first layer halves the picture itself: pooling 64 x 64 maps costs more than all the rest
                layers += [convolution(before, width, stride=2 if before == 3 else 1), nn.ReLU()]
                before = width
        self.layers = nn.Sequential(*layers)
        self.head = _Head(before, CROP >> len(widths), dim)

    def forward(self, crops: Tensor) -> Tensor:
        return self.head(self.layers(2 * crops - 1)).float()


Recognition = ResNetRecognition | ConvNeXtRecognition | VGGRecognition

RECOGNITION_MODELS: dict[str, type[Recognition]] = {
    "encoder": ResNetRecognition,
    "loss": ConvNeXtRecognition,
    "scorer": VGGRecognition,
}
"""Who uses which: the identity encoder, the ID loss, the judge of the benchmark."""
