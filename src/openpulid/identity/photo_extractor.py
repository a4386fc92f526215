"""Identity features of photos at full size: a face embedding and EVA02-CLIP's states."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openpulid.faces.align import gray_on_white
from openpulid.faces.arcface import ARCFACE_SIMILARITY, ArcFaceRecognition
from openpulid.faces.bisenet import FaceParsing, align_photo, load_face_parser
from openpulid.faces.face import Face
from openpulid.identity.detection import PhotoFaceDetection
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.identity import Identity, hash_models


class PhotoExtractor:
    """The extractor of PuLID's published adapters; every feature comes from the same face.

    Args:
        detection, recognition, face_parsing, vision_encoder: see their classes.
        models: name -> hash of the models; written into every identity.
        use_gray: pass the face in gray on white to the vision encoder, as in the training of the
            published adapters. False keeps color and background. It is recorded with the models
            in every identity, so that the two are not mixed.
    """

    same_person_similarity = ARCFACE_SIMILARITY

    def __init__(
        self,
        detection: PhotoFaceDetection,
        recognition: ArcFaceRecognition,
        face_parsing: FaceParsing,
        vision_encoder: VisionEncoder,
        models: Mapping[str, str] | None = None,
        use_gray: bool = True,
    ) -> None:
        self.recognition = recognition
        self.face_parsing = face_parsing
        self.vision_encoder = vision_encoder
        self.detection = detection
        self.models = dict(models or {})
        self.use_gray = use_gray
        if not use_gray:
            self.models["use_gray"] = "False"

    @classmethod
    def load(
        cls,
        detector: str | os.PathLike[str],
        recognition: str | os.PathLike[str],
        face_parsing: str | os.PathLike[str],
        vision_encoder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        use_gray: bool = True,
    ) -> PhotoExtractor:
        """Load from the published files.

        Args:
            detector: ONNX file; it uses the device's ONNX provider, if there is one.
            recognition: ONNX file; see `detector`.
            face_parsing: PyTorch file of BiSeNet, or ONNX file of selfie_multiclass.
            vision_encoder: PyTorch file.
            device: of all networks.
            dtype: of vision encoder and face parsing.
            use_gray: as for the class.

        Raises:
            WeightsError: a file is missing or damaged.
        """
        return cls(
            PhotoFaceDetection.load(detector, device),
            ArcFaceRecognition.load(recognition, device),
            load_face_parser(face_parsing, device),
            VisionEncoder.from_published(vision_encoder, dtype).to(device, dtype),
            # without the detector: a better one does not change the meaning of the features
            hash_models((recognition, vision_encoder)),
            use_gray,
        )

    @property
    def recognition_width(self) -> int:
        """Width of the face embedding, the first part of `id_cond`."""
        return self.recognition.dim

    def extract(self, faces: Sequence[Face]) -> list[Identity]:
        """Return one identity per face, in order."""
        return [self._extract_one(face) for face in faces]

    @torch.no_grad()
    def debug_crops(self, face: Face) -> list[Tensor]:
        """Return the aligned crop and the gray face on white, (3, 512, 512) in [0, 1] each."""
        crop = align_photo(face)
        return [crop[0], gray_on_white(crop, self.face_parsing(crop).to(crop))[0]]

    @torch.no_grad()
    def _extract_one(self, face: Face) -> Identity:
        parameter = next(self.vision_encoder.parameters())
        crop, gray = self.debug_crops(face)
        image = gray if self.use_gray else crop
        # cast after resizing: the CPU has no bicubic interpolation in bfloat16
        pixels = self.vision_encoder.prepare(image[None].to(parameter.device)).to(parameter.dtype)
        vision_embedding, hidden = self.vision_encoder(pixels)
        id_cond = torch.cat([self.recognition(face), vision_embedding.float().cpu()], dim=1)
        return Identity(
            id_cond[:, None],
            tuple(level.float().cpu() for level in hidden),
            self.models,
            face.normalized_landmarks[None, None].cpu(),
        )
