"""The face detector and face recognition models of the miniature; they know only its people."""

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
"""Width and height of the detector's input in pixels."""

PARTS = 8
"""Number of labels of the parsing map, in the order of `world.PARTS`."""
FACE = 1
"""Label of the face."""

MIN_PIXELS = 2
"""Rows and columns with fewer pixels of the face are ignored when the box is computed."""

CROP = 64
"""Width and height of the aligned crops of the recognition models, in pixels."""


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

    def segment(self, images: Tensor) -> Tensor:
        """Compute the probability that a pixel belongs to the face, differentiable in the images.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, 1, H, W), more than 0.5 on the masks of `detect`.
        """
        squares = torch.cat([_pad_to_square(image) for image in images])
        return _crop_padding(_face_probability(self(squares).parts), *images.shape[2:])

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
    probability = _face_probability(detection.parts[index : index + 1])
    mask = (_crop_padding(probability, height, width)[0] > 0.5).float()
    if not mask.any():
        return None
    offset = torch.tensor([(side - width) // 2, (side - height) // 2], device=mask.device)
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


def _face_probability(parts: Tensor) -> Tensor:
    return parts.softmax(1)[:, FACE : FACE + 1]


def _crop_padding(squares: Tensor, height: int, width: int) -> Tensor:
    """Undo `_pad_to_square` on maps (B, 1, 96, 96): resize them, and cut the padding off."""
    side = max(height, width)
    if side != SIZE:
        squares = interpolate(squares, (side, side), mode="bilinear")
    left = (side - width) // 2
    top = (side - height) // 2
    return squares[:, :, top : top + height, left : left + width]


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


class ResidualBlock(nn.Module):
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
        """Map (B, C, h, w) to (B, D, h / stride, w / stride)."""
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
                blocks.append(ResidualBlock(channels, width, 1 if index else 2))
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


MINI_SIMILARITY = 0.25
"""Cosine similarity from which two embeddings of the identity encoder's model are of one person.

24 people in the 8 scenes of `world.gallery`: 5.4% of the pairs of one person are below it (none of
those of the first three scenes), and 3.9% of the strangers' above. Medians: 0.46 and 0.02."""

Recognition = ResNetRecognition | ConvNeXtRecognition | VGGRecognition

RECOGNITION_MODELS: dict[str, type[Recognition]] = {
    "encoder": ResNetRecognition,
    "loss": ConvNeXtRecognition,
    "scorer": VGGRecognition,
}
"""The model of the identity encoder, of the ID loss and of the benchmark."""
