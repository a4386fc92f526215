"""Classifier of scene attributes, which measures whether an image follows its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from openpulid.faces.miniature import convolution
from openpulid.world import ATTRIBUTES


class AttributeClassifier(nn.Module):
    """A small convolutional network with one linear head per attribute of a scene.

    Args:
        widths: channels per level, from half the image size down.
        size: width and height of the input.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 96, 128), size: int = 96) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"widths": list(widths), "size": size}
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), convolution(12, widths[0]), nn.ReLU()]
        for channels, width in pairwise(widths):
            layers += [convolution(channels, width, stride=2), nn.ReLU()]
            layers += [convolution(width, width), nn.ReLU()]
        # The map is flattened, not pooled: positions distinguish a hat, a collar or a wink.
        layers += [nn.Conv2d(widths[-1], 32, 1), nn.Flatten(), nn.ReLU(), nn.Dropout(0.1)]
        self.layers = nn.Sequential(*layers)
        features = 32 * (size >> len(widths)) ** 2
        self.heads = nn.ModuleDict(
            {name: nn.Linear(features, len(classes)) for name, classes in ATTRIBUTES.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classify images.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            attribute -> (B, classes) logits in the order of `ATTRIBUTES`.
        """
        size = self.config["size"]
        if images.shape[-2:] != (size, size):
            images = interpolate(images, (size, size), mode="bilinear", antialias=True)
        features = self.layers(2 * images - 1)
        return {name: head(features).float() for name, head in self.heads.items()}
