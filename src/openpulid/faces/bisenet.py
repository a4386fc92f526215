"""Alignment and parsing of photographs, as facexlib does it."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor, nn

from openpulid.errors import WeightsError
from openpulid.faces.face import Face
from openpulid.faces.insightface_pack import to_uint8
from openpulid.io.checkpoints import read_tensors

CROP = 512


TEMPLATE = (
    (192.98138, 239.94708),
    (318.90277, 240.1936),
    (256.63416, 314.01935),
    (201.26117, 371.41043),
    (313.08905, 371.15118),
)
"""Where facexlib puts eyes, nose tip and mouth corners in a crop of 512 pixels (FFHQ's frame)."""


GROUND = (132, 133, 135)
"""RGB of what lies outside the photograph in such a crop, facexlib's."""


NOT_FACE = (0, 16, 18, 7, 8, 9, 14, 15)
"""Labels of BiSeNet that become white: background, cloth, hat, ears, earring, neck, necklace (PuLID, released code)."""


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FaceParser:
    """facexlib's BiSeNet (arXiv 1808.00897): which pixels of an aligned crop are face or hair."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls, file: str | os.PathLike[str], device: str | torch.device = "cpu") -> FaceParser:
        """From `parsing_bisenet.pth`. Raises WeightsError when it is missing or of another network."""
        from facexlib.parsing.bisenet import BiSeNet

        network = BiSeNet(num_class=19)
        try:
            network.load_state_dict(read_tensors(file), strict=True)
        except RuntimeError as error:
            raise WeightsError(f"{file} is not facexlib's BiSeNet: {error}") from error
        return cls(network.to(device))

    @torch.no_grad()
    def __call__(self, crop: Tensor) -> Tensor:
        """(1, 3, 512, 512) in [0, 1] -> (1, 1, 512, 512) float, 1 where the crop is kept."""
        crop = crop.to(next(self.network.parameters()).device)
        mean, std = (crop.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        labels = self.network((crop - mean) / std)[0].argmax(1, keepdim=True)
        return (~torch.isin(labels, torch.tensor(NOT_FACE, device=crop.device))).float()


def align_photo(face: Face) -> Tensor:
    """(1, 3, 512, 512) float in [0, 1]: the face in FFHQ's frame, as facexlib cuts it out."""
    import cv2

    matrix = cv2.estimateAffinePartial2D(
        (face.landmarks - 0.5).numpy(), np.array(TEMPLATE), method=cv2.LMEDS
    )[0]
    crop = cv2.warpAffine(to_uint8(face.image), matrix, (CROP, CROP), borderValue=GROUND)
    return torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255
