"""Detect and embed faces of many images without leaving the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from openpulid.faces.align import align_faces
from openpulid.faces.embed import FaceEmbeddings, crop_masked, embed_crops, with_gradient_of
from openpulid.faces.miniature import CROP, FACE, RECOGNITION_MODELS, MiniFaceDetector
from openpulid.io.checkpoints import load_module


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


class BatchFaceEmbedder:
    """A `FaceEmbedder` whose detector does not leave the device.

    Args:
        detector: face detector.
        models: face recognition models; they are frozen.
    """

    def __init__(self, detector: MiniFaceDetector, models: Sequence[nn.Module]) -> None:
        self.detector = detector
        self.models = [model.eval().requires_grad_(False) for model in models]

    def __call__(self, images: Tensor, generator: Generator | None = None) -> FaceEmbeddings:
        """Embed the faces of images (B, 3, 96, 96), see `FaceEmbedder`."""
        images = images.clamp(0, 1)
        found = detect_faces(self.detector, images.detach())
        masks = found.masks
        if images.requires_grad:
            masks = with_gradient_of(masks, self.detector.segment(images))
        faces = (images, masks, found.landmarks)
        embeddings = embed_crops(self.models, crop_masked, faces, generator)
        has_face = found.has_face
        return FaceEmbeddings(
            has_face, torch.where(has_face[:, None], embeddings, 0.0), found.masks
        )


def load_face_embedder(
    detector: MiniFaceDetector, weights: Path, device: torch.device
) -> BatchFaceEmbedder:
    """Load the recognition models of the ID loss and of the identity encoder from a folder."""
    models = []
    for name in ("loss", "encoder"):
        file = weights / f"recognition-{name}.safetensors"
        models.append(load_module(RECOGNITION_MODELS[name], file, device))
    return BatchFaceEmbedder(detector, models)
