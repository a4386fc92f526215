"""Detect and embed faces of many images without leaving the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openpulid.faces.align import align_faces
from openpulid.faces.mini_detector import FACE, MiniFaceDetector
from openpulid.faces.mini_recognition import CROP


@dataclass(frozen=True)
class DetectedFaces:
    """The faces of B images.

    Attributes:
        has_face: (B,) bool, whether a face was detected.
        masks: (B, 1, H, W) float, one on the pixels of the face.
        landmarks: (B, 5, 2) in pixels.
    """

    has_face: Tensor
    masks: Tensor
    landmarks: Tensor


@torch.no_grad()
def detect_faces(detector: MiniFaceDetector, images: Tensor) -> DetectedFaces:
    """Detect the faces of images (B, 3, 96, 96) in [0, 1], like `MiniFaceDetector.detect`."""
    detection = detector(images)
    masks = (detection.parts.softmax(1)[:, FACE : FACE + 1] > 0.5).float()
    has_box = detection.box[:, 2] > detection.box[:, 0]
    has_face = (detection.score_logit > 0) & has_box & (masks.amax((1, 2, 3)) > 0)
    return DetectedFaces(has_face, masks, detection.landmarks)


@torch.no_grad()
def embed_faces(
    detector: MiniFaceDetector, recognition: nn.Module, images: Tensor, batch: int = 512
) -> tuple[Tensor, Tensor]:
    """Embed the faces of images.

    Args:
        detector: face detector.
        recognition: face recognition model.
        images: (B, 3, 96, 96) in [0, 1].
        batch: images at a time.

    Returns:
        Embeddings (F, D) of the F images in which a face is detected, and (B,) bool, which images
        these are.
    """
    embeddings = []
    has_face = []
    for part in images.split(batch):
        faces = detect_faces(detector, part)
        crops = align_faces(part, faces.masks, faces.landmarks, CROP)[faces.has_face]
        if len(crops):
            embeddings.append(recognition(crops).float())
        has_face.append(faces.has_face)
    if not embeddings:
        return images.new_zeros(0, 1), torch.cat(has_face)
    return torch.cat(embeddings), torch.cat(has_face)
