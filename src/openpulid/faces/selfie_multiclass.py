"""Parsing of faces with MediaPipe's selfie_multiclass_256x256, in onnxruntime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.errors import WeightsError, explain_missing_library
from openpulid.faces.insightface_pack import select_providers

INPUT = 256
"""Width and height of the input in pixels."""

NUM_CLASSES = 6
"""Background, hair, body skin, face skin, clothes, others."""

FACE_CLASSES = (1, 3, 5)
"""Hair, face skin and others, which include glasses. BiSeNet's classes also tell hats and earrings
from glasses; here they remain."""


class SelfieParser:
    """Segments face and hair in an aligned crop; takes the place of `bisenet.FaceParser`.

    Args:
        session: an onnxruntime session of the network, (1, 256, 256, 3) RGB in [0, 1] ->
            (1, 256, 256, 6) logits.
    """

    def __init__(self, session: Any) -> None:
        self.session = session

    @classmethod
    def load(cls, file: str | os.PathLike[str], device: str | torch.device = "cpu") -> SelfieParser:
        """Load the network from its ONNX file.

        Raises:
            WeightsError: the file is missing or is of another network.
        """
        with explain_missing_library():
            import onnxruntime

        if not Path(file).is_file():
            raise WeightsError(
                f"{file} does not exist; `pulid weights get selfie-multiclass` downloads it."
            )
        providers = select_providers(device, onnxruntime.get_available_providers())
        try:
            session = onnxruntime.InferenceSession(os.fspath(file), providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            raise WeightsError(f"{file} cannot be opened; download it again.") from error
        shapes = [session.get_inputs()[0].shape[1:], session.get_outputs()[0].shape[1:]]
        if shapes != [[INPUT, INPUT, 3], [INPUT, INPUT, NUM_CLASSES]]:
            raise WeightsError(f"{file} is not MediaPipe's selfie_multiclass_256x256.")
        return cls(session)

    @torch.no_grad()
    def __call__(self, crop: Tensor) -> Tensor:
        """Segment a crop.

        Args:
            crop: (1, 3, S, S) in [0, 1].

        Returns:
            (1, 1, S, S) float, 1 on face and hair.
        """
        small = interpolate(crop.float().cpu(), (INPUT, INPUT), mode="bilinear", antialias=True)
        pixels = small.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()
        (output,) = self.session.run(None, {self.session.get_inputs()[0].name: pixels})
        logits = torch.from_numpy(output).permute(0, 3, 1, 2)
        # Enlarge logits instead of labels: the edges are smooth.
        logits = interpolate(logits, crop.shape[-2:], mode="bilinear")
        labels = logits.argmax(1, keepdim=True)
        return torch.isin(labels, torch.tensor(FACE_CLASSES)).float()
