"""Alignment and parsing (semantic segmentation) of faces in photos, as in facexlib."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpulid.errors import FaceError, explain_missing_library
from openpulid.faces.face import Face, require_landmarks
from openpulid.faces.insightface_pack import to_uint8
from openpulid.faces.selfie_multiclass import SelfieParser
from openpulid.io.checkpoints import load_state, read_tensors

CROP = 512
"""Width and height of the aligned crop in pixels."""

TEMPLATE = (
    (192.98138, 239.94708),
    (318.90277, 240.1936),
    (256.63416, 314.01935),
    (201.26117, 371.41043),
    (313.08905, 371.15118),
)
"""Eyes, nose tip and mouth corners in facexlib's crop of 512 pixels (FFHQ alignment)."""

BACKGROUND = (132, 133, 135)
"""RGB color outside of the photo in facexlib's crop."""

NOT_FACE = (0, 16, 18, 7, 8, 9, 14, 15)
"""BiSeNet labels that become white: background, cloth, hat, ears, earring, neck, necklace (PuLID,
released code)."""

# ImageNet statistics.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


FaceParsing = Callable[[Tensor], Tensor]
"""Segments a crop (1, 3, 512, 512) in [0, 1]: (1, 1, 512, 512) float, 1 on face and hair."""


class MainHead(nn.Module):
    """facexlib's BiSeNet without the two heads that only its training uses.

    Args:
        network: facexlib's `BiSeNet`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the logits (B, 19, H, W) of the labels."""
        network: Any = self.network
        spatial, context, _ = network.cp(images)
        logits, _ = network.conv_out(network.ffm(spatial, context))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)


class FaceParser:
    """facexlib's BiSeNet (arXiv 1808.00897): segments face and hair in an aligned crop.

    Args:
        network: maps images (B, 3, H, W) to the logits (B, labels, H, W) of the labels.
    """

    def __init__(self, network: nn.Module) -> None:
        # convolutions are faster on a CPU with channels last
        self.network = network.eval().to(memory_format=torch.channels_last)

    @classmethod
    def load(cls, file: str | os.PathLike[str], device: str | torch.device = "cpu") -> FaceParser:
        """Load the network from `parsing_bisenet.pth`.

        Raises:
            WeightsError: the file is missing or is of another network.
        """
        with explain_missing_library():
            from facexlib.parsing.bisenet import BiSeNet

        network = BiSeNet(num_class=19)
        load_state(network, read_tensors(file), f"{file} is not facexlib's BiSeNet")
        return cls(MainHead(network).to(device))

    @torch.no_grad()
    def __call__(self, crop: Tensor) -> Tensor:
        """Segment a crop.

        Args:
            crop: (1, 3, 512, 512) in [0, 1].

        Returns:
            (1, 1, 512, 512) float, 1 on face and hair.
        """
        crop = crop.to(next(self.network.parameters()).device)
        mean = crop.new_tensor(MEAN)[:, None, None]
        std = crop.new_tensor(STD)[:, None, None]
        normalized = ((crop - mean) / std).contiguous(memory_format=torch.channels_last)
        labels = self.network(normalized).argmax(1, keepdim=True)
        return (~torch.isin(labels, torch.tensor(NOT_FACE, device=crop.device))).float()


def load_face_parser(
    file: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> FaceParsing:
    """Load facexlib's BiSeNet from its `.pth` file, or MediaPipe's model from its `.onnx` file.

    Raises:
        WeightsError: the file is missing or is of another network.
    """
    if Path(file).suffix == ".onnx":
        return SelfieParser.load(file, device)
    return FaceParser.load(file, device)


def align_photo(face: Face) -> Tensor:
    """Crop a face in FFHQ alignment, as facexlib does; (1, 3, 512, 512) float in [0, 1].

    Raises:
        FaceError: the landmarks are not usable.
    """
    with explain_missing_library():
        import cv2

    require_landmarks(face)
    landmarks = (face.landmarks - 0.5).numpy()
    matrix = cv2.estimateAffinePartial2D(landmarks, np.array(TEMPLATE), method=cv2.LMEDS)[0]
    if matrix is None or not np.isfinite(matrix).all():
        raise FaceError("no face that can be aligned was detected; use another image.")
    crop = cv2.warpAffine(to_uint8(face.image), matrix, (CROP, CROP), borderValue=BACKGROUND)
    return torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255
