"""Face detection in photos with YuNet, the detector of OpenCV's model zoo."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.errors import WeightsError, explain_missing_library
from openpulid.faces.face import Face
from openpulid.faces.insightface_pack import is_yunet, to_uint8
from openpulid.faces.multi_scale import INPUT, SEARCH_DESCRIPTION, detect_at_all_sizes
from openpulid.faces.orientation import SAME_FACE, detect_in_all_orientations, overlap

CLEAR_SCORE = 0.92
"""Score from which an upright face is one.

YuNet gives the upright faces of eight photographs at least 0.93, and at most 0.90 when they are
upside down but reported as upright."""

MAX_OVERLAP = 0.3
"""Intersection over union from which two boxes are one face (OpenCV's default)."""

MAX_CANDIDATES = 5000
"""Number of boxes before overlapping ones are removed (OpenCV's default)."""


class YuNetDetector:
    """YuNet face detector (Wu et al. 2023, doi 10.1007/s11633-023-1423-y) in OpenCV, on the CPU.

    Args:
        model: a `cv2.FaceDetectorYN`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._lock = threading.Lock()  # the size of the input is state of the model

    @classmethod
    def load(cls, file: str | os.PathLike[str], threshold: float = 0.5) -> YuNetDetector:
        """Load the detector from its ONNX file.

        Args:
            file: the ONNX file.
            threshold: minimum score, 0 to 1.

        Raises:
            WeightsError: the file is missing or holds another network.
        """
        if not is_yunet(file):
            problem = "is not YuNet's file" if Path(file).is_file() else "does not exist"
            raise WeightsError(f"{file} {problem}; `pulid weights get yunet` downloads it.")
        with explain_missing_library():
            import cv2

        size = (INPUT, INPUT)
        try:
            model = cv2.FaceDetectorYN.create(
                os.fspath(file), "", size, threshold, MAX_OVERLAP, MAX_CANDIDATES
            )
        except cv2.error as error:
            raise WeightsError(f"{file} cannot be opened; download it again.") from error
        return cls(model)

    @property
    def search_description(self) -> str:
        """What `detect` tries, in words."""
        return SEARCH_DESCRIPTION

    def detect(self, image: Tensor) -> list[Face]:
        """Detect all faces, also in an image that is turned by a quarter or a half.

        Args:
            image: (3, H, W) float in [0, 1].

        Returns:
            Faces without masks, the largest first; an empty list without a face.
        """
        return detect_in_all_orientations(image, self.detect_upright, CLEAR_SCORE)

    def detect_upright(self, image: Tensor) -> list[Face]:
        """Detect all faces in an image that is known to be upright.

        Args:
            image: (3, H, W) float in [0, 1].

        Returns:
            Faces without masks, the largest first; an empty list without a face.
        """
        return detect_at_all_sizes(image, self._detect_in_mirror, CLEAR_SCORE)

    def _detect_in_mirror(self, image: Tensor) -> list[Face]:
        """Average the landmarks in the image and in its mirror image, which have other errors."""
        mirrored = [_mirror(face, image) for face in self._detect_once(image.flip(2))]
        faces = []
        for face in self._detect_once(image):
            same = [other.landmarks for other in mirrored if overlap(face, other) > SAME_FACE]
            # of several, none is the same for certain
            landmarks = [face.landmarks, *same] if len(same) == 1 else [face.landmarks]
            faces.append(replace(face, landmarks=torch.stack(landmarks).mean(0)))
        return faces

    def _detect_once(self, image: Tensor) -> list[Face]:
        """Run the network once, on the image reduced or enlarged to `INPUT`."""
        height, width = image.shape[1:]
        scale = INPUT / max(height, width)
        size = [max(1, round(side * scale)) for side in (height, width)]
        resized = interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
        with self._lock:
            self.model.setInputSize((size[1], size[0]))
            _, rows = self.model.detect(np.ascontiguousarray(to_uint8(resized)[..., ::-1]))
        if rows is None:
            return []
        pixels = torch.tensor([width / size[1], height / size[0]])
        limits = torch.tensor([width, height])
        faces = []
        # A row: left, top, width and height of the box; five landmarks, the eye on the left of the
        # image first; the score.
        for row in torch.from_numpy(rows).float():
            corners = torch.stack([row[:2], row[:2] + row[2:4]]) * pixels
            box = torch.minimum(corners.clamp(min=0), limits).flatten()
            faces.append(Face(image, box, row[4:14].reshape(5, 2) * pixels, float(row[14])))
        return sorted(faces, key=lambda face: -face.area)


def _mirror(face: Face, image: Tensor) -> Face:
    """Convert a face of the mirror image of `image` to a face of `image`."""
    width = image.shape[2]
    left, top, right, bottom = face.box.unbind()
    landmarks = face.landmarks[[1, 0, 2, 4, 3]]  # left is right in a mirror
    landmarks = torch.stack([width - landmarks[:, 0], landmarks[:, 1]], 1)
    box = torch.stack([width - right, top, width - left, bottom])
    return replace(face, image=image, box=box, landmarks=landmarks)
