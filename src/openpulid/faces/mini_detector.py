"""Where the face is: a small network that finds the miniature's own people and refuses everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from openpulid.faces.face import Face

SIZE = 96
"""Width and height of the pictures that the network sees."""

PARTS = 8
FACE = 1
"""How many parts the parsing map tells apart, and which of them is the face (the order of ``world.PARTS``)."""


@dataclass(frozen=True)
class MiniDetection:
    """What the network says about a batch of 96 x 96 pictures, in pixels of these.

    Attributes:
        score_logit: (B,) above zero: one of its faces.
        box: (B, 4) x1, y1, x2, y2 around the face part of the map; all zero where there is none. No gradient.
        landmarks: (B, 5, 2) left eye, right eye, nose tip, left and right mouth corner.
        parts: (B, 8, 96, 96) logits.
    """

    score_logit: Tensor
    box: Tensor
    landmarks: Tensor
    parts: Tensor

    @property
    def face(self) -> Tensor:
        """(B, 1, 96, 96) float 0 or 1: the pixels whose most likely part is the face."""
        return (self.parts.argmax(1, keepdim=True) == FACE).float()


def _conv_block(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class MiniFaceDetector(nn.Module):
    """A U-Net (Ronneberger et al. 2015) with three readings: a parsing map, heat maps whose centres of mass are the
    landmarks (integral regression, Sun et al. 2018), and a score from its deepest level."""

    config: dict[str, Any]

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96, 128)) -> None:
        super().__init__()
        self.config = {"widths": list(widths)}
        levels = list(pairwise(widths))
        self.stem = _conv_block(12, widths[0])  # pixel-unshuffled: 48 x 48
        self.down = nn.ModuleList(
            nn.Sequential(_conv_block(a, b, 2), _conv_block(b, b)) for a, b in levels
        )
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in levels)
        self.merge = nn.ModuleList(_conv_block(a, a) for a, _ in levels)
        self.parts = nn.Conv2d(widths[0], 4 * PARTS, 3, 1, 1)
        self.points = nn.Conv2d(widths[1], 5, 3, 1, 1)
        self.score = nn.Sequential(nn.Linear(2 * widths[-1], 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, images: Tensor) -> MiniDetection:
        """(B, 3, 96, 96) in [0, 1] -> Finding."""
        x = self.stem(nn.functional.pixel_unshuffle(2 * images - 1, 2))
        kept = []
        for layer in self.down:
            kept.append(x)
            x = layer(x)
        score = self.score(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
        points = x
        for level in reversed(range(len(kept))):
            x = interpolate(self.up[level](x), scale_factor=2, mode="nearest") + kept[level]
            x = self.merge[level](x)
            if level == 1:
                points = self.points(x)
        parts = nn.functional.pixel_shuffle(self.parts(x), 2).float()
        return MiniDetection(
            score.float()[:, 0], _boxes(parts), _centers_of_mass(points.float()), parts
        )

    @torch.no_grad()
    def find(self, images: Tensor | Sequence[Tensor], threshold: float = 0.5) -> list[Face | None]:
        """The face of each picture, or None where there is none of its faces.

        Args:
            images: (B, 3, H, W), or pictures (3, H, W) of any sizes; float in [0, 1].
            threshold: the smallest score that counts, 0 to 1.

        Returns:
            One `Face` or None per picture, in the picture's own pixels, on the picture's device.
        """
        if not len(images):
            return []
        device = next(self.parameters()).device
        finding = self(
            torch.cat([_pad_to_square(image.to(device, torch.float32)) for image in images])
        )
        scores = finding.score_logit.sigmoid().tolist()
        there = (finding.box[:, 2] > finding.box[:, 0]).tolist()
        return [
            _to_face(image, finding, index, score) if score >= threshold and present else None
            for index, (image, score, present) in enumerate(zip(images, scores, there, strict=True))
        ]


def _pad_to_square(image: Tensor) -> Tensor:
    """(3, H, W) -> (1, 3, 96, 96): gray bars make it square."""
    height, width = image.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    square = pad(image[None], (left, side - width - left, top, side - height - top), value=0.5)
    return (
        interpolate(square, (SIZE, SIZE), mode="bilinear", antialias=True)
        if side != SIZE
        else square
    )


def _to_face(image: Tensor, finding: MiniDetection, index: int, score: float) -> Face | None:
    """Picture `index` of the batch, back from 96 x 96 to the pixels of `image`."""
    height, width = image.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    mass = finding.parts[index : index + 1].softmax(1)[:, FACE : FACE + 1]
    whole = interpolate(mass, (side, side), mode="bilinear")[0] if side != SIZE else mass[0]
    mask = (whole[:, top : top + height, left : left + width] > 0.5).float()
    if not mask.any():
        return None
    corner = torch.tensor([left, top], device=mass.device)
    points = finding.landmarks[index] * (side / SIZE) - corner
    box = (finding.box[index] * (side / SIZE) - corner.repeat(2)).clamp(min=0)
    box = torch.minimum(box, torch.tensor([width, height, width, height], device=mass.device))
    return Face(image, box.to(image.device), points.to(image.device), score, mask.to(image.device))


@torch.no_grad()
def _boxes(parts: Tensor) -> Tensor:
    """(B, 4) around the face part; lines that hold less than two pixels of it are specks."""
    face = (parts.argmax(1) == FACE).float()
    sides = []
    for axis in (1, 2):  # columns, rows
        present = face.sum(axis) >= 2
        index = torch.arange(present.shape[1], device=parts.device)
        first = torch.where(present, index, SIZE).amin(1)
        last = torch.where(present, index + 1, 0).amax(1)
        sides.append((torch.minimum(first, last), last))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], 1).float()


def _centers_of_mass(maps: Tensor) -> Tensor:
    """(B, 5, h, h) heat map logits -> (B, 5, 2) centres of mass in pixels of the picture."""
    mass = maps.flatten(2).softmax(-1).unflatten(2, maps.shape[2:])
    centre = (torch.arange(maps.shape[-1], device=maps.device) + 0.5) * (SIZE / maps.shape[-1])
    return torch.stack([(mass.sum(2) * centre).sum(-1), (mass.sum(3) * centre).sum(-1)], -1)
