"""Face recognition with ArcFace networks (arXiv 1801.07698)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from openpulid.errors import explain_missing_library
from openpulid.faces.align import compose_affine, similarity_transform, warp_images
from openpulid.faces.augment import sample_jitter, vary_face
from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.face import Face, first_usable, require_landmarks
from openpulid.faces.insightface_pack import load_onnx_model, to_uint8
from openpulid.faces.photo_detector import PhotoDetector
from openpulid.io.checkpoints import load_state, read_tensors

ARCFACE_CROP = 112
"""Width and height of the input of ArcFace in pixels."""

ARCFACE_TEMPLATE = torch.tensor(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
"""(5, 2) positions of the landmarks in insightface's crop of 112 pixels."""


ARCFACE_SIMILARITY = 0.28
"""Cosine similarity from which two ArcFace embeddings are of one person.

One pair of strangers in a thousand exceeds it on LFW (Deb et al. 2019, arXiv 1908.05008)."""


class ArcFaceRecognition:
    """Face recognition model of an insightface pack; returns raw embeddings, not normalized."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], device: str | torch.device = "cpu"
    ) -> ArcFaceRecognition:
        """Load a face recognition model from an ONNX file.

        Raises:
            WeightsError: the file is missing or holds no face recognition model.
        """
        return cls(load_onnx_model(file, device, "get_feat"))

    @property
    def dim(self) -> int:
        """Width of the embeddings; 512 in the published packs."""
        return int(self.model.output_shape[-1])

    def __call__(self, face: Face) -> Tensor:
        """Return the embedding of a face, (1, 512) float32.

        Raises:
            FaceError: the landmarks are not usable.
        """
        crop = align_face(face, self.model.input_size[0])
        return torch.from_numpy(self.model.get_feat(crop)).float()


class FacexlibRecognition:
    """facexlib's ArcFace with 50 layers, as InfiniteYou uses it; embeddings have length 1.

    Args:
        network: from `load_arcface_ir_se50`.
    """

    dim = 512

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], device: str | torch.device = "cpu"
    ) -> FacexlibRecognition:
        """Load the network from a PyTorch file.

        Raises:
            WeightsError: the file is missing or is of another network.
        """
        return cls(load_arcface_ir_se50(file, device))

    @torch.no_grad()
    def __call__(self, face: Face) -> Tensor:
        """Return the embedding of a face, (1, 512) float32.

        Raises:
            FaceError: the landmarks are not usable.
        """
        crop = torch.from_numpy(align_face(face, ARCFACE_CROP)).float()
        parameter = next(self.network.parameters())
        pixels = (crop / 127.5 - 1).permute(2, 0, 1)[None].to(parameter)
        embedding: Tensor = self.network(pixels).float().cpu()
        return embedding


def load_recognition(
    file: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> ArcFaceRecognition | FacexlibRecognition:
    """Load a face recognition model: an ONNX file of insightface, or facexlib's PyTorch file.

    Raises:
        WeightsError: the file is missing or holds no face recognition model.
    """
    kind = ArcFaceRecognition if Path(file).suffix == ".onnx" else FacexlibRecognition
    return kind.load(file, device)


def align_face(face: Face, size: int) -> np.ndarray:
    """Crop a face as insightface does.

    Returns:
        (size, size, 3) uint8, BGR.

    Raises:
        FaceError: the landmarks are not usable.
    """
    with explain_missing_library():
        from insightface.utils.face_align import norm_crop

    require_landmarks(face)
    landmarks = (face.landmarks - 0.5).numpy()
    crop: np.ndarray = norm_crop(to_uint8(face.image)[..., ::-1], landmarks, size)
    return crop


def arcface_crop(
    images: Tensor, masks: Tensor, landmarks: Tensor, generator: Generator | None = None
) -> Tensor:
    """Crop faces for facexlib's ArcFace, differentiable in the images.

    Args:
        images: (B, 3, H, W) in [0, 1].
        masks: not used; part of the signature of `faces.embed.Crop`.
        landmarks: (B, 5, 2) in pixels.
        generator: of random views; None for the plain view.

    Returns:
        (B, 3, 112, 112) in [-1, 1], BGR.
    """
    matrix = similarity_transform(landmarks, ARCFACE_TEMPLATE.to(landmarks) + 0.5)
    if generator is not None:
        jitter = sample_jitter(len(matrix), ARCFACE_CROP, generator)
        matrix = compose_affine(matrix, jitter)
    crops = warp_images(images, matrix, ARCFACE_CROP)
    if generator is not None:
        crops = vary_face(crops, generator)
    return 2 * crops.flip(1) - 1


def build_face_embedder(detector: PhotoDetector, recognition: nn.Module) -> FaceEmbedder:
    """Build the embedder of the full-size ID loss, which uses the largest face of each image.

    Args:
        detector: the face detector.
        recognition: crops (B, 3, 112, 112) -> embeddings; not the model of the identity encoder.
    """

    def detect_largest(images: Tensor) -> list[Face | None]:
        return [first_usable(detector.detect_upright(image)) for image in images]

    return FaceEmbedder(detect_largest, recognition, crop=arcface_crop)


def load_arcface_ir_se50(
    file: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> nn.Module:
    """Load facexlib's ArcFace, a residual network of 50 layers.

    Returns:
        A module that maps (B, 3, 112, 112) in [-1, 1], BGR, to (B, 512).

    Raises:
        WeightsError: the file is missing or is of another network.
    """
    with explain_missing_library():
        from facexlib.recognition.arcface_arch import Backbone

    network = Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se")
    load_state(network, read_tensors(file), f"{file} is not facexlib's ArcFace")
    return network.eval().requires_grad_(False).to(device)
