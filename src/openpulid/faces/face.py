"""The result of face detection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Face:
    """One face in one image. Coordinates are pixels of `image`; pixel k covers [k, k + 1).

    Attributes:
        image: (3, H, W) float in [0, 1], the complete image.
        box: (4,) x1, y1, x2, y2 around the pixels of the face.
        landmarks: (5, 2) left eye, right eye, nose tip, left and right mouth corner; left has the
            smaller x.
        score: confidence of the detector, 0 to 1.
        mask: (1, H, W) float, 1 on the pixels of the face: skin, brows, eyes, nose and mouth, but
            not hair or glasses. None if the detector only returns boxes and landmarks.
        scale: pixels of the original image per pixel of `image`; large images are shrunk before
            detection.
    """

    image: Tensor
    box: Tensor
    landmarks: Tensor
    score: float
    mask: Tensor | None = None
    scale: float = 1.0

    @property
    def pixel_box(self) -> list[int]:
        """x1, y1, x2, y2 of the box in whole pixels of the original image, as used in messages."""
        return [round(value * self.scale) for value in self.box.tolist()]

    @property
    def width(self) -> float:
        """The width of the box in pixels."""
        return float(self.box[2] - self.box[0])

    @property
    def normalized_landmarks(self) -> Tensor:
        """(5, 2) landmarks in [0, 1] of the square in which the image is centered."""
        height, width = self.image.shape[-2:]
        side = max(height, width)
        margin = torch.tensor([(side - width) / 2, (side - height) / 2]).to(self.landmarks)
        return (self.landmarks + margin) / side

    @property
    def area(self) -> float:
        """The area of the box in square pixels; the largest face has the largest area."""
        return self.width * float(self.box[3] - self.box[1])
