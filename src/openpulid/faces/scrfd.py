"""Faces in photographs: insightface's detector and recogniser, facexlib's parsing, and the crop that the vision tower sees.

The networks are those of the two libraries, on onnxruntime and on PyTorch. Both count a pixel's centre as a whole number,
`Face` counts its edge: they are half a pixel apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from openpulid.faces.face import Face
from openpulid.faces.insightface_pack import load_onnx_model, to_uint8

LONGEST = 1024
"""Pixels of a photograph's longer side when it is read, at most (PuLID, released code): a recogniser's crop of 112 pixels takes
single ones of a larger photograph, not what lies between them."""

SIZES = (640, 512, 384, 256)
"""Widths of the square that a picture is fitted into, tried in this order: a large face is found in a small one."""

BORDER = 0.5
"""Width of the gray border, over the picture's longer side, in the last attempt: a crop as tight as the face needs air."""


class SCRFDDetector:
    """SCRFD (arXiv 2105.04714), the detector of insightface's packs.

    Args:
        model: an insightface detection model.
        sizes: tried in this order until a face is found; then once more on a copy with a border.
        threshold: the smallest score that counts, 0 to 1.
    """

    def __init__(self, model: Any, sizes: Sequence[int] = SIZES, threshold: float = 0.5) -> None:
        self.model, self.sizes, self.threshold = model, tuple(sizes), threshold

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], device: str | torch.device = "cpu", **options: Any
    ) -> SCRFDDetector:
        """From an ONNX file. Raises WeightsError when it is missing or no detector."""
        return cls(load_onnx_model(file, device, "detect"), **options)

    @property
    def tried(self) -> str:
        """What `find` does before it gives up, in words."""
        return f"sizes {', '.join(map(str, self.sizes))} and a copy with a border"

    def find(self, image: Tensor) -> list[Face]:
        """All faces at the first size that shows any.

        Args:
            image: (3, H, W) float in [0, 1].

        Returns:
            Faces without masks, the largest first; none is an empty list.
        """
        for size in self.sizes:
            if faces := self._at(image, image, size, 0):
                return faces
        margin = round(BORDER * max(image.shape[1:]))
        around = pad(image, (margin,) * 4, value=0.5)
        return next(
            (faces for size in self.sizes if (faces := self._at(image, around, size, margin))), []
        )

    def _at(self, image: Tensor, shown: Tensor, size: int, margin: int) -> list[Face]:
        """Faces of `shown`, which is `image` with a margin, in pixels of `image`."""
        boxes, points = self.model.detect(
            to_uint8(shown)[..., ::-1], input_size=(size, size), det_thresh=self.threshold
        )
        height, width = image.shape[1:]
        faces = []
        for box, five in zip(
            torch.from_numpy(boxes).float(), torch.from_numpy(points).float(), strict=True
        ):
            corners = box[:4] + 0.5 - margin
            corners = torch.minimum(
                corners.clamp(min=0), torch.tensor([width, height, width, height])
            )
            faces.append(Face(image, corners, five + 0.5 - margin, float(box[4])))
        return sorted(faces, key=lambda face: -face.area)
