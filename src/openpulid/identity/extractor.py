"""From a detected face to identity features: the protocol, and the miniature's extractors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from openpulid.faces.align import (
    gray_on_white,
    mask_background,
)
from openpulid.faces.face import Face, require_landmarks
from openpulid.faces.miniature import (
    MINI_SIMILARITY,
    MiniFaceDetector,
    ResNetRecognition,
)
from openpulid.identity.detection import FaceDetection, MiniFaceDetection
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.face_latents import FaceLatentEncoder, crop_faces, place_on_white
from openpulid.identity.identity import Identity, hash_models
from openpulid.io.checkpoints import load_module


class IdentityExtractor(Protocol):
    """Extracts identities from detected faces.

    Implemented by `MiniExtractor`, `FaceLatentExtractor`, `FaceEmbeddingExtractor`,
    `photo_extractor.PhotoExtractor` and `clip_extractor.ClipExtractor`.
    """

    models: dict[str, str]
    """Name -> hash of the models that determine the features."""

    @property
    def detection(self) -> FaceDetection:
        """Detects the faces in an image."""

    def extract(self, faces: Sequence[Face]) -> list[Identity]:
        """Return one identity per face, in order.

        Raises:
            FaceError: the landmarks of a face are not usable.
        """

    def debug_crops(self, face: Face) -> list[Tensor]:
        """Return the crops (3, S, S) in [0, 1] that the extractor's models receive."""


@dataclass(frozen=True)
class DeferredExtractor:
    """An identity extractor that is loaded when a face has to be analyzed.

    Saved identities are checked against the hashes alone.

    Attributes:
        models: see `IdentityExtractor`.
        load: loads the extractor.
    """

    models: dict[str, str]
    load: Callable[[], IdentityExtractor]


class MiniExtractor:
    """The miniature's extractor: face detector, recognition model and vision encoder.

    Args:
        detector: face detector.
        recognition: aligned crops (B, 3, 64, 64) -> raw embeddings (B, R).
        vision_encoder: gray face on white -> embedding and hidden states.
        models: name -> hash of the models; written into every identity.
    """

    same_person_similarity = MINI_SIMILARITY

    def __init__(
        self,
        detector: MiniFaceDetector,
        recognition: nn.Module,
        vision_encoder: VisionEncoder,
        models: Mapping[str, str] | None = None,
    ) -> None:
        self.detector = detector
        self.recognition = recognition
        self.vision_encoder = vision_encoder
        self.detection: FaceDetection = MiniFaceDetection(detector)
        self.models = dict(models or {})

    @classmethod
    def load(
        cls,
        detector: str | os.PathLike[str],
        recognition: str | os.PathLike[str],
        vision_encoder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
    ) -> MiniExtractor:
        """Load from three files of `checkpoints.save_module`.

        The hashes of recognition model and vision encoder are what an identity is checked
        against. The detector is left out, because a better one does not change the meaning of
        the features.

        Raises:
            WeightsError: a file is missing or damaged.
        """
        return cls(
            load_module(MiniFaceDetector, detector, device),
            load_module(ResNetRecognition, recognition, device),
            load_module(VisionEncoder, vision_encoder, device),
            hash_models([recognition, vision_encoder]),
        )

    @property
    def recognition_width(self) -> int:
        """Width of the face embedding, the first part of `id_cond`."""
        config: Mapping[str, int] = self.recognition.config  # type: ignore[assignment]
        return config["dim"]

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.vision_encoder.parameters()).device

    @torch.no_grad()
    def extract(self, faces: Sequence[Face]) -> list[Identity]:
        """Return one identity per face, in order."""
        return [self._extract_one(face) for face in faces]

    def _extract_one(self, face: Face) -> Identity:
        id_cond, hidden = self.extract_batch(*(x.to(self.device) for x in _batch_of(face)))
        return Identity(
            id_cond[:, None].float().cpu(),
            tuple(x.float().cpu() for x in hidden),
            self.models,
            face.normalized_landmarks[None, None].cpu(),
        )

    @torch.no_grad()
    def debug_crops(self, face: Face) -> list[Tensor]:
        """Return the aligned crop and the gray face on white, (3, S, S) in [0, 1] each."""
        crops, masks = crop_faces(*_batch_of(face), self.vision_encoder.img_size)
        return [crops[0], gray_on_white(crops, masks)[0]]

    def extract_batch(
        self, images: Tensor, masks: Tensor, landmarks: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Extract the features of a batch of faces, for training; differentiable in the images.

        Args:
            images: (B, 3, H, W) in [0, 1].
            masks: (B, 1, H, W) in [0, 1], the pixels of the face.
            landmarks: (B, 5, 2) in pixels.

        Returns:
            id_cond (B, C): raw face embedding and vision embedding, concatenated; and five hidden
            states (B, 1 + N, D).
        """
        aligned = crop_faces(images, masks, landmarks)
        embedding = self.recognition(mask_background(*aligned))
        aligned = crop_faces(images, masks, landmarks, self.vision_encoder.img_size)
        pixels = self.vision_encoder.prepare(gray_on_white(*aligned))
        vision_embedding, hidden = self.vision_encoder(pixels)
        return torch.cat([embedding, vision_embedding.to(embedding)], dim=1), hidden


CropExtractor = TypeVar("CropExtractor", bound="_CropExtractor")


class _CropExtractor:
    """The miniature's extractor of one network that reads the aligned face.

    Args:
        detection: face detection, with masks of the face.
        network: crops -> features.
        models: name -> hash of the models; written into every identity.
    """

    same_person_similarity = MINI_SIMILARITY
    network_class: ClassVar[type[nn.Module]]

    def __init__(
        self, detection: FaceDetection, network: nn.Module, models: Mapping[str, str] | None = None
    ) -> None:
        self.detection = detection
        self.network = network
        self.models = dict(models or {})

    @classmethod
    def load(
        cls: type[CropExtractor],
        detector: str | os.PathLike[str],
        network: str | os.PathLike[str],
        device: str | torch.device = "cpu",
    ) -> CropExtractor:
        """Load from two files of `checkpoints.save_module`.

        Raises:
            WeightsError: a file is missing or damaged.
        """
        return cls(
            MiniFaceDetection(load_module(MiniFaceDetector, detector, device)),
            load_module(cls.network_class, network, device),
            hash_models([network]),
        )

    @property
    def recognition_width(self) -> int:
        """Width of the face embedding in `id_cond`; 0 for other features."""
        raise NotImplementedError

    def extract(self, faces: Sequence[Face]) -> list[Identity]:
        """Return one identity per face, in order."""
        return [self._extract_one(face) for face in faces]

    @torch.no_grad()
    def debug_crops(self, face: Face) -> list[Tensor]:
        """Return what the network reads, (3, 64, 64) in [0, 1]."""
        return [self._prepare(*_batch_of(face))[0]]

    @torch.no_grad()
    def extract_batch(self, images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
        """Extract the features of a batch of faces, see `MiniExtractor.extract_batch`."""
        features: Tensor = self.network(self._prepare(images, masks, landmarks))
        return features

    def _prepare(self, images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
        raise NotImplementedError

    def _extract_one(self, face: Face) -> Identity:
        device = next(self.network.parameters()).device
        features = self.extract_batch(*(x.to(device) for x in _batch_of(face)))
        landmarks = face.normalized_landmarks[None, None].cpu()
        return Identity(features.float().cpu().flatten(1)[:, None], (), self.models, landmarks)


class FaceLatentExtractor(_CropExtractor):
    """The miniature's extractor of W+ Adapter; `photo_extractor.LatentExtractor` is that of photos.

    `id_cond` holds the latents (1, 1, 18 * W).
    """

    network: FaceLatentEncoder
    network_class = FaceLatentEncoder
    recognition_width = 0
    """Latents are no face embedding."""

    def _prepare(self, images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
        return place_on_white(*crop_faces(images, masks, landmarks))


class FaceEmbeddingExtractor(_CropExtractor):
    """The miniature's extractor of methods that read the face embedding alone."""

    network: ResNetRecognition
    network_class = ResNetRecognition

    @property
    def recognition_width(self) -> int:
        """Width of the face embedding, which is all of `id_cond`."""
        return int(self.network.config["dim"])

    def _prepare(self, images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
        return mask_background(*crop_faces(images, masks, landmarks))


def _batch_of(face: Face) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, mask and landmarks of a face, as a batch of one."""
    assert face.mask is not None, "the miniature's detector returns masks"
    require_landmarks(face)
    return face.image[None], face.mask[None], face.landmarks[None]
