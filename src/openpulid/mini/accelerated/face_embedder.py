"""The ID loss's face embedder: several face recognition models, on random crops."""

from __future__ import annotations

from collections.abc import Sequence
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
from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.faces.mini_recognition import CROP, RECOGNITION_MODELS
from openpulid.io.checkpoints import load_module
from openpulid.mini.accelerated.face_detection import detect_faces
from openpulid.mini.data.augment import augment, color_jitter, compose_affine, dilate, random_affine


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
            return mask_background(augment(colors, generator), dilate(crops[:, 3:], generator))


def load_face_embedder(
    detector: MiniFaceDetector, weights: Path, device: torch.device
) -> EnsembleFaceEmbedder:
    """Load the recognition models of the ID loss and of the identity encoder from a folder."""
    models = []
    for name in ("loss", "encoder"):
        file = weights / f"recognition-{name}.safetensors"
        models.append(load_module(RECOGNITION_MODELS[name], file, device))
    return EnsembleFaceEmbedder(detector, models)
