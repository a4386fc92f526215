"""The miniature's three face recognition models, of different architectures with one signature.

Each maps aligned crops (B, 3, 64, 64) in [0, 1] with everything but the face gray
(`faces.align.align_faces`) to raw embeddings (B, dim), which are compared by their cosine. Identity
encoder, ID loss and benchmark use different networks, so that no model scores what it has trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

CROP = 64
"""Width and height of the crops in pixels."""


def convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Build a 3x3 convolution with batch normalization."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.BatchNorm2d(channels_out)
    )


class _Head(nn.Sequential):
    """ArcFace's head E: the map is flattened, not pooled, since positions identify features."""

    def __init__(self, channels: int, side: int, dim: int) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(channels * side * side, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),
        )


class _Residual(nn.Module):
    """Improved residual block of ArcFace (Deng et al. 2019), with normalization before and after.

    It uses ReLU instead of PReLU, which takes longer on a CPU than the convolutions.
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
    """Residual network; used by the identity encoder."""

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
        blocks = []
        channels = stem
        for width, depth in zip(widths, depths, strict=True):
            for index in range(depth):
                blocks.append(_Residual(channels, width, 1 if index else 2))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = _Head(channels, CROP >> (len(widths) + 1), dim)

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops (B, 3, 64, 64) to embeddings (B, dim)."""
        return self.head(self.blocks(self.stem(2 * crops - 1))).float()


class _ConvNeXtBlock(nn.Module):
    """Depthwise convolution, normalization and an MLP per pixel (Liu et al. 2022)."""

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
        # Channels last: the MLP is a plain matrix product.
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + self.perceptron(self.norm(y)).permute(0, 3, 1, 2)


class ConvNeXtRecognition(nn.Module):
    """Patches of 4x4 pixels and ConvNeXt blocks; used by the ID loss."""

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
        # Patches without overlap would lose details at their borders: an iris is two pixels wide.
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), convolution(48, widths[0]))
        layers: list[nn.Module] = []
        for stage, (width, depth, kernel) in enumerate(zip(widths, depths, kernels, strict=True)):
            if stage:
                layers.append(nn.Conv2d(widths[stage - 1], width, 2, 2))
            layers += [_ConvNeXtBlock(width, kernel) for _ in range(depth)]
        self.blocks = nn.Sequential(*layers)
        self.head = _Head(widths[-1], CROP >> (len(widths) + 1), dim)

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops (B, 3, 64, 64) to embeddings (B, dim)."""
        return self.head(self.blocks(self.stem(2 * crops - 1))).float()


class VGGRecognition(nn.Module):
    """Plain convolutions and max pooling (Parkhi et al. 2015); used by the benchmark."""

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
        channels = 3
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                # The first layer has stride 2: pooling 64 x 64 maps would cost more than all other
                # layers.
                stride = 2 if channels == 3 else 1
                layers += [convolution(channels, width, stride), nn.ReLU()]
                channels = width
        self.layers = nn.Sequential(*layers)
        self.head = _Head(channels, CROP >> len(widths), dim)

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops (B, 3, 64, 64) to embeddings (B, dim)."""
        return self.head(self.layers(2 * crops - 1)).float()


Recognition = ResNetRecognition | ConvNeXtRecognition | VGGRecognition

RECOGNITION_MODELS: dict[str, type[Recognition]] = {
    "encoder": ResNetRecognition,
    "loss": ConvNeXtRecognition,
    "scorer": VGGRecognition,
}
"""The model of the identity encoder, of the ID loss and of the benchmark."""
