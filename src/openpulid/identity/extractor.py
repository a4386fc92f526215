"""From a found face to features: one face, and everything that is known of it comes from that face."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from openpulid.faces.align import TEMPLATE, mask_background, similarity_transform, warp_images
from openpulid.faces.face import Face
from openpulid.faces.mini_detector import SIZE, MiniFaceDetector
from openpulid.faces.mini_recognition import CROP, ResNetRecognition
from openpulid.faces.preprocess import gray_on_white
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.identity import Identity
from openpulid.io import checkpoints as weights


class IdentityExtractor(Protocol):
    """What a studio needs to know people by: the miniature's `MiniExtractor`, or `photos.PhotoExtractor`."""

    models: dict[str, str]

    @property
    def search_description(self) -> str:
        """What `detect` does before it gives up, in words."""

    def detect(self, image: Tensor) -> list[Face]:
        """The faces in a picture (3, H, W) in [0, 1]."""

    def identities(self, faces: Sequence[Face]) -> list[Identity]:
        """Each face as an identity of its own, in order."""

    def shown(self, face: Face) -> list[Tensor]:
        """What is read of a face, (3, S, S) in [0, 1] each: the aligned crop, and the face alone in gray."""


class DetectedFaces:
    """What finds the miniature's faces: one in a picture, or none."""

    def __init__(self, finder: MiniFaceDetector) -> None:
        self.finder = finder

    @property
    def search_description(self) -> str:
        """What `detect` does before it gives up, in words."""
        return f"one look at {SIZE} pixels"

    def detect(self, image: Tensor) -> list[Face]:
        """The face in a picture (3, H, W) in [0, 1]; none, or one: the finder looks for no more."""
        return [face for face in self.finder.detect([image]) if face is not None]


class MiniExtractor(DetectedFaces):
    """Finder, recogniser and vision tower, asked in this order.

    Args:
        finder: picture -> `Face`.
        recogniser: (B, 3, 64, 64) aligned crops -> (B, R) raw embeddings.
        tower: gray face on white -> embedding and hidden levels.
        models: name -> hash of the three; written into every identity.
    """

    def __init__(
        self,
        finder: MiniFaceDetector,
        recogniser: nn.Module,
        tower: VisionEncoder,
        models: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(finder)
        self.recogniser, self.tower = recogniser, tower
        self.models = dict(models or {})

    @classmethod
    def load(
        cls,
        finder: str | os.PathLike[str],
        recogniser: str | os.PathLike[str],
        tower: str | os.PathLike[str],
        device: str | torch.device = "cpu",
    ) -> MiniExtractor:
        """From three files of `weights.save_module`; their hashes are what an identity is checked against.

        Raises:
            WeightsError: one is missing or damaged.
        """
        return cls(
            weights.load_module(MiniFaceDetector, finder, device),
            weights.load_module(ResNetRecognition, recogniser, device),
            weights.load_module(VisionEncoder, tower, device),
            # the finder may be bettered without changing what a face's features mean
            {Path(path).stem: weights.fingerprint(path) for path in (recogniser, tower)},
        )

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.tower.parameters()).device

    @torch.no_grad()
    def identities(self, faces: Sequence[Face]) -> list[Identity]:
        """Each face as an identity of its own, in order."""
        return [self._one(face) for face in faces]

    def _one(self, face: Face) -> Identity:
        assert face.mask is not None, "this finder's faces have masks"
        tensors = (face.image, face.mask, face.landmarks)
        id_cond, hidden = self.features(*(x[None].to(self.device) for x in tensors))
        kept = tuple(x.float().cpu() for x in hidden)
        return Identity(
            id_cond[:, None].float().cpu(), kept, self.models, face.normalized_landmarks[None, None].cpu()
        )

    @torch.no_grad()
    def shown(self, face: Face) -> list[Tensor]:
        """What is read of a face, (3, S, S) in [0, 1] each: the aligned crop, and the face alone in gray."""
        assert face.mask is not None, "this finder's faces have masks"
        crop, kept = self._crops(
            face.image[None], face.mask[None], face.landmarks[None], self.tower.img_size
        )
        return [crop[0], gray_on_white(crop, kept)[0]]

    def features(
        self, images: Tensor, masks: Tensor, landmarks: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Many faces at once, as training wants them; differentiable in the images.

        Args:
            images: (B, 3, H, W) in [0, 1].
            masks: (B, 1, H, W) in [0, 1], the faces' own pixels.
            landmarks: (B, 5, 2) in pixels.

        Returns:
            id_cond (B, C): the raw face embedding, then the tower's; and five hidden levels (B, 1 + N, D).
        """
        embedding = self.recogniser(mask_background(*self._crops(images, masks, landmarks, CROP)))
        crops, kept = self._crops(images, masks, landmarks, self.tower.img_size)
        seen, hidden = self.tower(self.tower.prepare(gray_on_white(crops, kept)))
        return torch.cat([embedding, seen.to(embedding)], dim=1), hidden

    def _crops(
        self, images: Tensor, masks: Tensor, landmarks: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """(B, 3, size, size) pictures and (B, 1, size, size) masks with the landmarks in the template's place."""
        both = warp_images(
            torch.cat([images, masks.to(images)], 1),
            similarity_transform(landmarks, TEMPLATE * size),
            size,
        )
        return both[:, :3], both[:, 3:]
