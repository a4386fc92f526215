"""Face recognition with SFace, the model of OpenCV's zoo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.errors import WeightsError, explain_missing_library
from openpulid.faces.insightface_pack import to_uint8


class SFaceRecognition(nn.Module):
    """SFace (arXiv 2205.12010) in OpenCV, on the CPU and without gradients.

    Args:
        model: a `cv2.FaceRecognizerSF`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> SFaceRecognition:
        """Load the model from its ONNX file.

        Raises:
            WeightsError: the file is missing or cannot be opened.
        """
        with explain_missing_library():
            import cv2

        if not Path(file).is_file():
            raise WeightsError(
                f"{file} does not exist; `pulid weights get scorer-sface` downloads it."
            )
        try:
            return cls(cv2.FaceRecognizerSF.create(os.fspath(file), ""))
        except cv2.error as error:
            raise WeightsError(f"{file} cannot be opened; download it again.") from error

    def forward(self, crops: Tensor) -> Tensor:
        """Embed aligned faces.

        Args:
            crops: (B, 3, 112, 112) RGB in [-1, 1], aligned as for ArcFace.

        Returns:
            (B, 128) float32.
        """
        embeddings = []
        for crop in crops:
            pixels = to_uint8((crop + 1) / 2)[..., ::-1].copy()
            embeddings.append(torch.from_numpy(self.model.feature(pixels)[0].copy()))
        return torch.stack(embeddings)
