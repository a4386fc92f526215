"""What a finder hands on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Face:
    """One face in one picture. Coordinates are pixels of `image`; pixel k covers [k, k + 1).

    Attributes:
        image: (3, H, W) float in [0, 1], the whole picture.
        box: (4,) x1, y1, x2, y2 around the face's own pixels.
        landmarks: (5, 2) left eye, right eye, nose tip, left and right mouth corner; left is the smaller x.
        score: how sure the finder is, 0 to 1.
        mask: (1, H, W) float 0 or 1, the face's own pixels: skin, brows, eyes, nose, mouth; not hair, not glasses. None
            from a finder that gives boxes and landmarks alone.
        scale: how many pixels of the photo as it was given one of `image` is; a large photo is shrunk before it is read.
    """

    image: Tensor
    box: Tensor
    landmarks: Tensor
    score: float
    mask: Tensor | None = None
    scale: float = 1.0

    @property
    def corners(self) -> list[int]:
        """x1, y1, x2, y2 of the box in whole pixels of the photo as it was given: what messages say."""
        return [round(value * self.scale) for value in self.box.tolist()]

    @property
    def width(self) -> float:
        """The width of the box in pixels."""
        return float(self.box[2] - self.box[0])

    @property
    def places(self) -> Tensor:
        """(5, 2) landmarks from 0 to 1 across the picture's longer side, the picture in the middle of a square."""
        height, width = self.image.shape[-2:]
        side = max(height, width)
        margin = torch.tensor([(side - width) / 2, (side - height) / 2]).to(self.landmarks)
        return (self.landmarks + margin) / side

    @property
    def area(self) -> float:
        """The area of the box in square pixels: what "the largest face" compares."""
        return self.width * float(self.box[3] - self.box[1])
