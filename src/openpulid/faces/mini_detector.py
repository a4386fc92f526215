"""The miniature's face detector: a small network that only accepts its synthetic people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, pixel_shuffle, pixel_unshuffle

from openpulid.faces.face import Face

SIZE = 96
"""Width and height of the input in pixels."""

PARTS = 8
"""Number of labels of the parsing map, in the order of `world.PARTS`."""
FACE = 1
"""Label of the face."""

MIN_PIXELS = 2
"""Rows and columns with fewer pixels of the face are ignored when the box is computed."""


@dataclass(frozen=True)
class MiniDetection:
    """Output of the network for B images of 96 x 96, in pixels of these.

    Attributes:
        score_logit: (B,) above zero if the image shows a face.
        box: (B, 4) x1, y1, x2, y2 around the face label; zero without a face. No gradient.
        landmarks: (B, 5, 2) left eye, right eye, nose tip, left and right mouth corner.
        parts: (B, 8, 96, 96) logits of the labels.
    """

    score_logit: Tensor
    box: Tensor
    landmarks: Tensor
    parts: Tensor

    @property
    def face(self) -> Tensor:
        """(B, 1, 96, 96) float, 1 where the most likely label is the face."""
        return (self.parts.argmax(1, keepdim=True) == FACE).float()


def _conv_block(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class MiniFaceDetector(nn.Module):
    """A U-Net (Ronneberger et al. 2015) with three outputs.

    A parsing map, heat maps whose centers of mass are the landmarks (integral regression, Sun et
    al. 2018), and a score from the deepest level.

    Args:
        widths: channels per level, from half the image size down.
    """

    config: dict[str, Any]

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96, 128)) -> None:
        super().__init__()
        self.config = {"widths": list(widths)}
        levels = list(pairwise(widths))
        self.stem = _conv_block(12, widths[0])  # after a pixel-unshuffle: 48 x 48
        self.down = nn.ModuleList(
            nn.Sequential(_conv_block(a, b, 2), _conv_block(b, b)) for a, b in levels
        )
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in levels)
        self.merge = nn.ModuleList(_conv_block(a, a) for a, _ in levels)
        self.parts = nn.Conv2d(widths[0], 4 * PARTS, 3, 1, 1)
        self.points = nn.Conv2d(widths[1], 5, 3, 1, 1)
        self.score = nn.Sequential(nn.Linear(2 * widths[-1], 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, images: Tensor) -> MiniDetection:
        """Map images (B, 3, 96, 96) in [0, 1] to detections."""
        x = self.stem(pixel_unshuffle(2 * images - 1, 2))
        skips = []
        for layer in self.down:
            skips.append(x)
            x = layer(x)
        score = self.score(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
        points = x
        for level in reversed(range(len(skips))):
            x = interpolate(self.up[level](x), scale_factor=2, mode="nearest") + skips[level]
            x = self.merge[level](x)
            if level == 1:
                points = self.points(x)
        parts = pixel_shuffle(self.parts(x), 2).float()
        landmarks = _centers_of_mass(points.float())
        return MiniDetection(score.float()[:, 0], _boxes(parts), landmarks, parts)

    @torch.no_grad()
    def detect(
        self, images: Tensor | Sequence[Tensor], threshold: float = 0.5
    ) -> list[Face | None]:
        """Detect the face of each image.

        Args:
            images: (B, 3, H, W), or a list of (3, H, W) of any sizes; float in [0, 1].
            threshold: minimum score, 0 to 1.

        Returns:
            One `Face` per image, in its own pixels and on its device, or None if there is no face.
        """
        if not len(images):
            return []
        device = next(self.parameters()).device
        batch = [_pad_to_square(image.to(device, torch.float32)) for image in images]
        detection = self(torch.cat(batch))
        scores = detection.score_logit.sigmoid().tolist()
        has_box = (detection.box[:, 2] > detection.box[:, 0]).tolist()
        faces: list[Face | None] = []
        for index, (image, score) in enumerate(zip(images, scores, strict=True)):
            if score >= threshold and has_box[index]:
                faces.append(_to_face(image, detection, index, score))
            else:
                faces.append(None)
        return faces


def _pad_to_square(image: Tensor) -> Tensor:
    """Pad an image (3, H, W) to a square with gray and resize it to (1, 3, 96, 96)."""
    height, width = image.shape[-2:]
    side = max(height, width)
    left = (side - width) // 2
    top = (side - height) // 2
    square = pad(image[None], (left, side - width - left, top, side - height - top), value=0.5)
    if side == SIZE:
        return square
    return interpolate(square, (SIZE, SIZE), mode="bilinear", antialias=True)


def _to_face(image: Tensor, detection: MiniDetection, index: int, score: float) -> Face | None:
    """Convert detection `index` of a batch from 96 x 96 to the pixels of `image`."""
    height, width = image.shape[-2:]
    side = max(height, width)
    left = (side - width) // 2
    top = (side - height) // 2
    probability = detection.parts[index : index + 1].softmax(1)[:, FACE : FACE + 1]
    if side != SIZE:
        probability = interpolate(probability, (side, side), mode="bilinear")
    mask = (probability[0, :, top : top + height, left : left + width] > 0.5).float()
    if not mask.any():
        return None
    offset = torch.tensor([left, top], device=mask.device)
    landmarks = detection.landmarks[index] * (side / SIZE) - offset
    box = (detection.box[index] * (side / SIZE) - offset.repeat(2)).clamp(min=0)
    box = torch.minimum(box, torch.tensor([width, height, width, height], device=mask.device))
    return Face(
        image,
        box.to(image.device),
        landmarks.to(image.device),
        score,
        mask.to(image.device),
    )


@torch.no_grad()
def _boxes(parts: Tensor) -> Tensor:
    """Compute the boxes (B, 4) around the face label, without specks."""
    face = (parts.argmax(1) == FACE).float()
    starts = []
    ends = []
    for axis in (1, 2):  # columns, rows
        is_covered = face.sum(axis) >= MIN_PIXELS
        index = torch.arange(is_covered.shape[1], device=parts.device)
        start = torch.where(is_covered, index, SIZE).amin(1)
        end = torch.where(is_covered, index + 1, 0).amax(1)
        starts.append(torch.minimum(start, end))
        ends.append(end)
    return torch.stack([*starts, *ends], 1).float()


def _centers_of_mass(maps: Tensor) -> Tensor:
    """Map heat map logits (B, 5, h, h) to centers of mass (B, 5, 2) in pixels of the image."""
    mass = maps.flatten(2).softmax(-1).unflatten(2, maps.shape[2:])
    center = (torch.arange(maps.shape[-1], device=maps.device) + 0.5) * (SIZE / maps.shape[-1])
    return torch.stack([(mass.sum(2) * center).sum(-1), (mass.sum(3) * center).sum(-1)], -1)
