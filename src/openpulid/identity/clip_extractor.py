"""Identity features of a CLIP vision encoder, a face recognition model, or both.

For IP-Adapter, FaceID, PhotoMaker and InfiniteYou.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.faces.align import similarity_transform, warp_images
from openpulid.faces.arcface import (
    ARCFACE_CROP,
    ARCFACE_SIMILARITY,
    ARCFACE_TEMPLATE,
    load_recognition,
)
from openpulid.faces.face import Face, require_landmarks
from openpulid.identity.detection import FaceDetection, MiniFaceDetection, PhotoFaceDetection
from openpulid.identity.eva_clip import normalize_for_clip
from openpulid.identity.identity import Identity, hash_models
from openpulid.io.checkpoints import explain_bad_weights, load_state, read_tensors

ClipInput = Literal["image", "padded image", "face"]


class FaceRecognition(Protocol):
    """Maps a face to its raw embedding (1, R)."""

    @property
    def dim(self) -> int:
        """R, the width of the embedding."""

    def __call__(self, face: Face) -> Tensor:
        """Return the raw embedding (1, R) of a face."""


class ClipExtractor:
    """Extracts a vision encoder's embedding and hidden states; an `IdentityExtractor`.

    The hidden states of an empty image are stored as well, for the unconditional branch.

    Args:
        detection: face detection.
        vision_encoder: CLIPVisionModelWithProjection of transformers; None for methods that use
            the face recognition model alone.
        clip_input: what the vision encoder reads: the center square of the "image", the whole
            image as a "padded image", or the aligned "face".
        layer: index of the hidden states, as in `hidden_states`. IP-Adapter and FaceID use the
            last but one.
        recognition: its embedding precedes the vision encoder's; None for methods without one.
        models: name -> hash of the models; written into every identity.
    """

    same_person_similarity = ARCFACE_SIMILARITY

    def __init__(
        self,
        detection: FaceDetection,
        vision_encoder: Any,
        clip_input: ClipInput = "image",
        layer: int = -2,
        recognition: FaceRecognition | None = None,
        models: Mapping[str, str] | None = None,
    ) -> None:
        self.detection = detection
        self.vision_encoder = vision_encoder
        self.clip_input = clip_input
        self.layer = layer
        self.recognition = recognition
        self.models = dict(models or {})

    @classmethod
    def load(
        cls,
        detector: Path,
        recognition: Path | None,
        vision_encoder: Path | None,
        device: torch.device,
        dtype: torch.dtype,
        clip_input: ClipInput = "image",
        is_miniature: bool = False,
    ) -> ClipExtractor:
        """Load from files.

        Args:
            detector: file of the face detector.
            recognition: file of the face recognition model, or None.
            vision_encoder: file of the vision encoder, or None.
            device: of all networks.
            dtype: of the vision encoder.
            clip_input: as for the class.
            is_miniature: the detector is the miniature's.

        Raises:
            WeightsError: a file is missing or damaged.
        """
        detection, embedder = cls.load_face_models(detector, recognition, device, is_miniature)
        encoder = None
        if vision_encoder is not None:
            encoder = load_clip_encoder(read_tensors(vision_encoder, dtype)).to(device, dtype)
        files = [file for file in (recognition, vision_encoder) if file is not None]
        return cls(detection, encoder, clip_input, recognition=embedder, models=hash_models(files))

    @staticmethod
    def load_face_models(
        detector: Path, recognition: Path | None, device: torch.device, is_miniature: bool = False
    ) -> tuple[FaceDetection, FaceRecognition | None]:
        """Load face detection and face recognition, see `load`."""
        detection: FaceDetection
        if is_miniature:
            detection = MiniFaceDetection.load(detector, device)
        else:
            detection = PhotoFaceDetection.load(detector, device)
        if recognition is None:
            return detection, None
        return detection, load_recognition(recognition, device)

    @property
    def recognition_width(self) -> int:
        """Width of the face embedding, the first part of `id_cond`; 0 for methods without one."""
        return self.recognition.dim if self.recognition else 0

    def extract(self, faces: Sequence[Face]) -> list[Identity]:
        """Return one identity per face, in order.

        `id_cond` is (1, 1, R + E). `hidden` has the states of the image and of an empty one.
        """
        return [self._extract_one(face) for face in faces]

    @torch.no_grad()
    def debug_crops(self, face: Face) -> list[Tensor]:
        """Return the input of the vision encoder, (3, S, S) in [0, 1], if there is one."""
        if self.vision_encoder is None:
            return []
        size = self.vision_encoder.config.image_size
        if self.clip_input == "image":
            return [center_square(face.upright_image, size)]
        if self.clip_input == "padded image":
            return [pad_to_square(face.upright_image, size)]
        require_landmarks(face)
        template = (ARCFACE_TEMPLATE + 0.5) * size / ARCFACE_CROP
        transform = similarity_transform(face.landmarks[None], template)
        return [warp_images(face.image[None], transform, size)[0]]

    @torch.no_grad()
    def _extract_one(self, face: Face) -> Identity:
        embeddings = [self.recognition(face).float().cpu()] if self.recognition else []
        states: tuple[Tensor, ...] = ()
        if self.vision_encoder is not None:
            embedding, states = self._encode(face)
            embeddings.append(embedding)
        id_cond = torch.cat(embeddings, 1)[:, None]
        return Identity(id_cond, states, self.models, face.normalized_landmarks[None, None].cpu())

    def _encode(self, face: Face) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the embedding (1, E), and the states (1, 1 + N, D) of the image and of none."""
        return encode_clip(self.vision_encoder, self.debug_crops(face)[0], self.layer)


@torch.no_grad()
def encode_clip(
    encoder: Any, image: Tensor, layer: int = -2
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Encode an image with a CLIP vision encoder.

    Args:
        encoder: CLIPVisionModelWithProjection of transformers.
        image: (3, S, S) in [0, 1], of the size that the encoder reads.
        layer: index of the hidden states.

    Returns:
        The embedding (1, E), and the states (1, 1 + N, D) of the image and of an empty one.
    """
    pixels = normalize_for_clip(image.cpu())[None].to(encoder.device, encoder.dtype)
    # an empty image is zero after normalization, as in diffusers
    batch = torch.cat([pixels, torch.zeros_like(pixels)])
    output = encoder(batch, output_hidden_states=True)
    states = output.hidden_states[layer].float().cpu()
    return output.image_embeds[:1].float().cpu(), (states[:1], states[1:])


def clip_config(tensors: Mapping[str, Tensor]) -> CLIPVisionConfig:
    """Infer the sizes of a CLIP vision encoder from its tensors.

    Heads and activation are those of OpenAI's and LAION's encoders.

    Raises:
        KeyError: the tensors are those of another network.
    """
    embeddings = "vision_model.embeddings"
    patches = tensors[f"{embeddings}.patch_embedding.weight"]
    positions = tensors[f"{embeddings}.position_embedding.weight"]
    width = patches.shape[0]
    patch_size = patches.shape[-1]
    layers = "vision_model.encoder.layers."
    layer_numbers = {name.split(".")[3] for name in tensors if name.startswith(layers)}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=tensors[f"{layers}0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layer_numbers),
        num_attention_heads=16 if width >= 1024 else max(1, width // 64),
        patch_size=patch_size,
        image_size=round((len(positions) - 1) ** 0.5) * patch_size,
        projection_dim=tensors["visual_projection.weight"].shape[0],
        hidden_act="gelu" if width > 1024 else "quick_gelu",
    )


def load_clip_encoder(tensors: Mapping[str, Tensor]) -> CLIPVisionModelWithProjection:
    """Build a published vision encoder from its tensors.

    Raises:
        WeightsError: tensors are missing, or there are others.
    """
    # old files contain the position numbers
    weights = {name: x for name, x in tensors.items() if not name.endswith("position_ids")}
    message = "this is not a CLIP vision encoder"
    with explain_bad_weights(message), init_empty_weights(include_buffers=False):
        encoder = CLIPVisionModelWithProjection(clip_config(weights))
    load_state(encoder, weights, message, assign=True)
    return encoder.eval().requires_grad_(False)


def center_square(image: Tensor, size: int) -> Tensor:
    """Crop the center square and resize it, as CLIP's image processor does.

    Args:
        image: (3, H, W) in [0, 1].
        size: side of the result in pixels.

    Returns:
        (3, size, size).
    """
    height, width = image.shape[-2:]
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    square = image[None, :, top : top + side, left : left + side]
    return interpolate(square, size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)


def pad_to_square(image: Tensor, size: int) -> Tensor:
    """Pad to a square with black and resize it, as FastComposer's authors do.

    Args:
        image: (3, H, W) in [0, 1].
        size: side of the result in pixels.

    Returns:
        (3, size, size).
    """
    height, width = image.shape[-2:]
    side = max(height, width)
    top = (side - height) // 2
    left = (side - width) // 2
    square = pad(image[None], (left, side - width - left, top, side - height - top))
    return interpolate(square, size=(size, size), mode="bilinear", antialias=True)[0]
