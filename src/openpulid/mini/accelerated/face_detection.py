"""Detect and embed faces of many images without leaving the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from openpulid.faces.align import (
    TEMPLATE,
    align_faces,
    mask_background,
    similarity_transform,
    warp_images,
)
from openpulid.faces.embed import FaceEmbeddings
from openpulid.faces.miniature import CROP, FACE, RECOGNITION_MODELS, MiniFaceDetector
from openpulid.io.checkpoints import load_module
from openpulid.mini.data import color_jitter, compose_affine, degrade, dilate, random_affine


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


class EnsembleFaceEmbedder:
    """Embeds faces with several face recognition models at once.

    The cosine of two embeddings is the mean of the models' cosines. With gradients enabled, each
    model sees its own random augmentation of the face. A texture that deceives one model in one
    crop then gains nothing in the next.

    Args:
        detector: face detector.
        models: face recognition models; they are frozen.
        seed: of the augmentation.
    """

    def __init__(
        self, detector: MiniFaceDetector, models: Sequence[nn.Module], seed: int = 0
    ) -> None:
        self.detector = detector
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> FaceEmbeddings:
        """Embed the faces of images (B, 3, 96, 96), which are clamped to [0, 1]."""
        images = images.clamp(0, 1)
        faces = detect_faces(self.detector, images.detach())
        embeddings = []
        for model in self.models:
            if torch.is_grad_enabled():
                crops = self._augmented_crops(images, faces.masks, faces.landmarks)
            else:
                crops = align_faces(images, faces.masks, faces.landmarks, CROP)
            embeddings.append(normalize(model(crops).float(), dim=-1))
        concatenated = torch.cat(embeddings, 1)
        return FaceEmbeddings(
            faces.has_face,
            torch.where(faces.has_face[:, None], concatenated, 0.0),
            faces.masks,
        )

    def _augmented_crops(self, images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
        generator = self.generator
        with torch.autocast(images.device.type, enabled=False):
            jitter = random_affine(len(images), CROP, generator, turn=0.10, grow=0.08, shift=0.03)
            matrix = compose_affine(similarity_transform(landmarks, TEMPLATE * CROP), jitter)
            crops = warp_images(torch.cat([images, masks], 1), matrix, CROP)
            colors = color_jitter(crops[:, :3], generator, strength=0.6, gray=0.2)
            return mask_background(degrade(colors, generator), dilate(crops[:, 3:], generator))


def load_face_embedder(
    detector: MiniFaceDetector, weights: Path, device: torch.device
) -> EnsembleFaceEmbedder:
    """Load the recognition models of the ID loss and of the identity encoder from a folder."""
    models = []
    for name in ("loss", "encoder"):
        file = weights / f"recognition-{name}.safetensors"
        models.append(load_module(RECOGNITION_MODELS[name], file, device))
    return EnsembleFaceEmbedder(detector, models)
