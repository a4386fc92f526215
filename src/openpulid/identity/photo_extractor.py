"""From a photograph's face to features at full size: antelopev2's embedding and EVA02-CLIP's view of the gray face."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from openpulid.faces.arcface import ArcFaceRecognition
from openpulid.faces.bisenet import FaceParser, align_photo
from openpulid.faces.face import Face
from openpulid.faces.preprocess import gray_on_white
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.identity import Identity
from openpulid.io import checkpoints as weights


class PhotoExtractor:
    """Detector, recogniser, parsing and vision tower of the published adapters; every feature comes from the same face.

    Args:
        finder, recogniser, parser, tower: see their classes.
        models: name -> fingerprint; written into every identity.
        use_gray: the tower sees the face in gray on white, as the published adapters learned it; False leaves its colour
            and everything around it, and is written into identities beside the models: the two are not mixed.
    """

    def __init__(
        self,
        finder: SCRFDDetector,
        recogniser: ArcFaceRecognition,
        parser: FaceParser,
        tower: VisionEncoder,
        models: Mapping[str, str] | None = None,
        use_gray: bool = True,
    ) -> None:
        self.finder, self.recogniser, self.parser, self.tower = finder, recogniser, parser, tower
        self.models, self.use_gray = dict(models or {}), use_gray
        if not use_gray:
            self.models["use_gray"] = "False"

    @classmethod
    def load(
        cls,
        detector: str | os.PathLike[str],
        recogniser: str | os.PathLike[str],
        parser: str | os.PathLike[str],
        tower: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        use_gray: bool = True,
    ) -> PhotoExtractor:
        """From the published files.

        Args:
            device, dtype: of tower and parsing; detector and recogniser take the device's provider where there is one.
            use_gray: as for the class.

        Raises:
            WeightsError: one is missing or damaged.
        """
        return cls(
            SCRFDDetector.load(detector, device),
            ArcFaceRecognition.load(recogniser, device),
            FaceParser.load(parser, device),
            VisionEncoder.from_published(tower).to(device, dtype),
            # a better detector does not change what a face's features mean
            {Path(file).stem: weights.fingerprint(file) for file in (recogniser, tower)},
            use_gray,
        )

    @property
    def search_description(self) -> str:
        """What `detect` does before it gives up, in words."""
        return self.finder.search_description

    def detect(self, image: Tensor) -> list[Face]:
        """The faces in a picture (3, H, W) in [0, 1], the largest first."""
        return self.finder.detect(image)

    def identities(self, faces: Sequence[Face]) -> list[Identity]:
        """Each face as an identity of its own, in order."""
        return [self._one(face) for face in faces]

    @torch.no_grad()
    def shown(self, face: Face) -> list[Tensor]:
        """What is read of a face, (3, 512, 512) in [0, 1] each: the aligned crop, and the face alone in gray."""
        crop = align_photo(face)
        return [crop[0], gray_on_white(crop, self.parser(crop).to(crop))[0]]

    @torch.no_grad()
    def _one(self, face: Face) -> Identity:
        parameter = next(self.tower.parameters())
        crop, gray = self.shown(face)
        pixels = self.tower.prepare((gray if self.use_gray else crop)[None].to(parameter.device))
        seen, hidden = self.tower(
            pixels.to(parameter.dtype)
        )  # cast when it is fitted: a CPU has no bicubic in bfloat16
        id_cond = torch.cat([self.recogniser(face), seen.float().cpu()], dim=1)
        kept = tuple(level.float().cpu() for level in hidden)
        return Identity(id_cond[:, None], kept, self.models, face.normalized_landmarks[None, None].cpu())
