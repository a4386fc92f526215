"""What a picture of the miniature's world shows, read back: the judge of whether a prompt was followed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from openpulid.faces.mini_recognition import convolution
from openpulid.world import ATTRIBUTES


class AttributeClassifier(nn.Module):
    """A small convolutional network with one linear head per attribute of a scene.

    Args:
        widths: of the levels, from half the picture's size down by halves.
        size: of the pictures.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 96, 128), size: int = 96) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"widths": list(widths), "size": size}
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), convolution(12, widths[0]), nn.ReLU()]
        for before, width in pairwise(widths):
            layers += [
                convolution(before, width, stride=2),
                nn.ReLU(),
                convolution(width, width),
                nn.ReLU(),
            ]
        # where something is says what it is (a hat, a collar, a wink), so the map is flattened, not pooled
        self.layers = nn.Sequential(
            *layers, nn.Conv2d(widths[-1], 32, 1), nn.Flatten(), nn.ReLU(), nn.Dropout(0.1)
        )
        features = 32 * (size >> len(widths)) ** 2
        self.heads = nn.ModuleDict(
            {name: nn.Linear(features, len(classes)) for name, classes in ATTRIBUTES.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [0, 1] -> attribute name -> (B, classes) scores in the order of `ATTRIBUTES`."""
        size = self.config["size"]
        if images.shape[-2:] != (size, size):
            images = interpolate(images, (size, size), mode="bilinear", antialias=True)
        seen = self.layers(2 * images - 1)
        return {name: head(seen).float() for name, head in self.heads.items()}
