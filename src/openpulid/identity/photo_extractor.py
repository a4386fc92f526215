"""Identity features of photos at full size: embeddings and states, or latents of StyleGAN2."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from openpulid.faces.align import gray_on_white
from openpulid.faces.arcface import ARCFACE_SIMILARITY, ArcFaceRecognition
from openpulid.faces.bisenet import FaceParsing, align_photo, load_face_parser
from openpulid.faces.face import Face
from openpulid.identity.detection import FaceDetection, PhotoFaceDetection
from openpulid.identity.e4e import E4E, SIDE
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


class LatentExtractor:
    """The extractor of W+ Adapter: StyleGAN2 latents of a face on white.

    The authors align by dlib's 68 landmarks and segment with PSFRGAN's network. Here the five
    landmarks of the face detector and the preset's face parsing are used, whose background is
    everything but face and hair.

    Args:
        detection, face_parsing, encoder: see their classes.
        models: name -> hash of the models; written into every identity.
    """

    same_person_similarity = ARCFACE_SIMILARITY
    recognition_width = 0
    """Latents are no face embedding."""

    def __init__(
        self,
        detection: FaceDetection,
        face_parsing: FaceParsing,
        encoder: E4E,
        models: Mapping[str, str] | None = None,
    ) -> None:
        self.detection = detection
        self.face_parsing = face_parsing
        self.encoder = encoder
        self.models = dict(models or {})

    @classmethod
    def load(
        cls,
        detector: str | os.PathLike[str],
        face_parsing: str | os.PathLike[str],
        encoder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
    ) -> LatentExtractor:
        """Load from the published files, see `PhotoExtractor.load`.

        Raises:
            WeightsError: a file is missing or damaged.
        """
        detection = PhotoFaceDetection.load(detector, device)
        parsing = load_face_parser(face_parsing, device)
        return cls(detection, parsing, E4E.load(encoder).to(device), hash_models([encoder]))

    def extract(self, faces: Sequence[Face]) -> list[Identity]:
        """Return one identity per face, in order; `id_cond` holds the latents (1, 1, 18 * 512)."""
        return [self._extract_one(face) for face in faces]

    @torch.no_grad()
    def debug_crops(self, face: Face) -> list[Tensor]:
        """Return the aligned face on white, (3, 256, 256) in [0, 1]."""
        crop = align_photo(face)
        background = 1 - self.face_parsing(crop).to(crop)
        soft = avg_pool2d(background, 5, stride=1, padding=2, count_include_pad=False)
        white = crop * (1 - soft) + soft
        return [interpolate(white, (SIDE, SIDE), mode="bilinear")[0]]

    @torch.no_grad()
    def _extract_one(self, face: Face) -> Identity:
        pixels = 2 * self.debug_crops(face)[0][None] - 1
        latents = self.encoder(pixels.to(next(self.encoder.parameters())))
        landmarks = face.normalized_landmarks[None, None].cpu()
        return Identity(latents.float().cpu().flatten(1)[:, None], (), self.models, landmarks)
