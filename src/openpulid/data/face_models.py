"""The face models with which a dataset is prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from openpulid.faces.align import TEMPLATE, align_faces, similarity_transform, warp_images
from openpulid.faces.arcface import ArcFaceRecognition
from openpulid.faces.bisenet import CROP, FaceParsing, align_photo, load_face_parser
from openpulid.faces.bisenet import TEMPLATE as PHOTO_TEMPLATE
from openpulid.faces.face import Face
from openpulid.faces.miniature import CROP as MINI_CROP
from openpulid.faces.miniature import ResNetRecognition
from openpulid.identity.detection import FaceDetection, MiniFaceDetection, PhotoFaceDetection
from openpulid.io.checkpoints import load_module


class FaceModels(Protocol):
    """The face models with which a dataset is prepared."""

    @property
    def detection(self) -> FaceDetection:
        """Detects the faces of an image."""

    def embed(self, face: Face) -> Tensor:
        """Return the embedding of a face, (D,) float32."""

    def measure_occlusion(self, face: Face) -> float:
        """Return which part of the face between eyes and mouth is hidden, 0 to 1."""


class PhotoFaceModels:
    """Face models for photos, see `PhotoExtractor`."""

    def __init__(
        self, detection: FaceDetection, recognition: ArcFaceRecognition, face_parsing: FaceParsing
    ) -> None:
        self.detection = detection
        self.recognition = recognition
        self.face_parsing = face_parsing

    @classmethod
    def load(
        cls, detector: Path, recognition: Path, face_parsing: Path, device: str | torch.device
    ) -> PhotoFaceModels:
        """Load from the published files.

        Raises:
            WeightsError: a file is missing or damaged.
        """
        return cls(
            PhotoFaceDetection.load(detector, device),
            ArcFaceRecognition.load(recognition, device),
            load_face_parser(face_parsing, device),
        )

    def embed(self, face: Face) -> Tensor:
        """Return the embedding of a face, (D,) float32."""
        return self.recognition(face)[0]

    def measure_occlusion(self, face: Face) -> float:
        """Return which part of the face between eyes and mouth is hidden, 0 to 1."""
        mask = self.face_parsing(align_photo(face))[0, 0].cpu()
        return _hidden_part(mask, np.array(PHOTO_TEMPLATE) * len(mask) / CROP)


class MiniFaceModels:
    """Face models for synthetic people, see `MiniExtractor`."""

    def __init__(self, detection: FaceDetection, recognition: ResNetRecognition) -> None:
        self.detection = detection
        self.recognition = recognition

    @classmethod
    def load(cls, detector: Path, recognition: Path, device: str | torch.device) -> MiniFaceModels:
        """Load from the miniature's files.

        Raises:
            WeightsError: a file is missing or damaged.
        """
        return cls(
            MiniFaceDetection.load(detector, device),
            load_module(ResNetRecognition, recognition, device),
        )

    @torch.no_grad()
    def embed(self, face: Face) -> Tensor:
        """Return the embedding of a face, (D,) float32."""
        assert face.mask is not None, "the miniature's detector returns masks"
        image, mask, landmarks = (
            value[None].float() for value in (face.image, face.mask, face.landmarks)
        )
        crop = align_faces(image, mask, landmarks, MINI_CROP)
        device = next(self.recognition.parameters()).device
        return self.recognition(crop.to(device))[0].float().cpu()

    def measure_occlusion(self, face: Face) -> float:
        """Return which part of the face between eyes and mouth is hidden, 0 to 1."""
        assert face.mask is not None, "the miniature's detector returns masks"
        template = TEMPLATE * MINI_CROP
        matrix = similarity_transform(face.landmarks[None].float(), template)
        mask = warp_images(face.mask[None].float(), matrix, MINI_CROP)[0, 0]
        return _hidden_part(mask.cpu(), template.numpy())


def _hidden_part(mask: Tensor, landmarks: np.ndarray) -> float:
    """Return the part of the area between eyes and mouth corners that a mask leaves out.

    Args:
        mask: (S, S), 1 on the pixels of the face.
        landmarks: (5, 2) in pixels of the mask.
    """
    corners = landmarks[[0, 1, 4, 3]].round().astype(np.int32)
    area = cv2.fillConvexPoly(np.zeros(mask.shape, np.uint8), corners, 1).astype(bool)
    return 1 - float(mask.numpy()[area].mean())
