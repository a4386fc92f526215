"""What CLIP sees of somebody: for IP-Adapter, FaceID-PlusV2 and PhotoMaker, which read a picture tower's states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.errors import WeightsError
from openpulid.faces.align import similarity_transform, warp_images
from openpulid.faces.arcface import ARCFACE_CROP, ARCFACE_TEMPLATE
from openpulid.faces.face import Face
from openpulid.identity.eva_clip import CLIP_MEAN, CLIP_STD
from openpulid.identity.identity import Identity

View = Literal["picture", "face"]


class FaceDetector(Protocol):
    """What is asked for faces: any `identity.features.IdentityExtractor`."""

    @property
    def search_description(self) -> str: ...

    def detect(self, image: Tensor) -> list[Face]: ...


class FaceRecognition(Protocol):
    """A face to its raw embedding (1, R)."""

    def __call__(self, face: Face) -> Tensor: ...


class ClipExtractor:
    """A picture tower's embedding and states of a photo, and its states of an empty one; an
    `identity.features.IdentityExtractor`.

    Args:
        faces: finds them.
        tower: transformers' CLIPVisionModelWithProjection; None for methods that read the recogniser alone.
        view: "picture" shows the tower the whole photo, its middle square; "face" the aligned face alone.
        layer: whose states are kept, as `hidden_states` counts them: the last but one, as IP-Adapter and FaceID read.
        recogniser: its embedding comes before the tower's; None for methods that know no faces.
        models: name -> fingerprint; written into every identity.
    """

    def __init__(
        self,
        faces: FaceDetector,
        tower: Any,
        view: View = "picture",
        layer: int = -2,
        recogniser: FaceRecognition | None = None,
        models: Mapping[str, str] | None = None,
    ) -> None:
        self.faces, self.tower, self.view, self.layer, self.recogniser = (
            faces,
            tower,
            view,
            layer,
            recogniser,
        )
        self.models = dict(models or {})

    @property
    def search_description(self) -> str:
        """What `detect` does before it gives up, in words."""
        return self.faces.search_description

    def detect(self, image: Tensor) -> list[Face]:
        """The faces in a picture (3, H, W) in [0, 1]."""
        return self.faces.detect(image)

    def identities(self, faces: Sequence[Face]) -> list[Identity]:
        """Each face as an identity of its own: `id_cond` (1, 1, R + E), `hidden` the states of the photo and of nothing."""
        return [self._one(face) for face in faces]

    @torch.no_grad()
    def shown(self, face: Face) -> list[Tensor]:
        """What the tower is shown, (3, S, S) in [0, 1]."""
        if self.tower is None:
            return []
        size = self.tower.config.image_size
        if self.view == "face":
            template = (ARCFACE_TEMPLATE + 0.5) * size / ARCFACE_CROP
            return [
                warp_images(
                    face.image[None], similarity_transform(face.landmarks[None], template), size
                )[0]
            ]
        return [center_square(face.image, size)]

    @torch.no_grad()
    def _one(self, face: Face) -> Identity:
        known = [self.recogniser(face).float().cpu()] if self.recogniser else []
        states: tuple[Tensor, ...] = ()
        if self.tower is not None:
            seen, states = self._seen(face)
            known.append(seen)
        return Identity(
            torch.cat(known, 1)[:, None], states, self.models, face.normalized_landmarks[None, None].cpu()
        )

    def _seen(self, face: Face) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The embedding (1, E), and the states (1, 1 + N, D) of the photo and of nothing."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pixels = ((self.shown(face)[0].cpu() - mean) / std)[None].to(
            self.tower.device, self.tower.dtype
        )
        # nothing is zero after normalisation, as diffusers shows it
        seen = self.tower(torch.cat([pixels, torch.zeros_like(pixels)]), output_hidden_states=True)
        states = seen.hidden_states[self.layer].float().cpu()
        return seen.image_embeds[:1].float().cpu(), (states[:1], states[1:])


def clip_config(tensors: Mapping[str, Tensor]) -> CLIPVisionConfig:
    """The sizes of a CLIP picture tower, from its tensors; heads and activation are those of OpenAI's and LAION's towers.

    Raises:
        KeyError: these are another network's.
    """
    seen = "vision_model.embeddings"
    patches, positions = (
        tensors[f"{seen}.patch_embedding.weight"],
        tensors[f"{seen}.position_embedding.weight"],
    )
    width, patch = patches.shape[0], patches.shape[-1]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(
            {
                name.split(".")[3]
                for name in tensors
                if name.startswith("vision_model.encoder.layers.")
            }
        ),
        num_attention_heads=16 if width >= 1024 else max(1, width // 64),
        patch_size=patch,
        image_size=round((len(positions) - 1) ** 0.5) * patch,
        projection_dim=tensors["visual_projection.weight"].shape[0],
        hidden_act="gelu" if width > 1024 else "quick_gelu",
    )


def load_clip_encoder(tensors: Mapping[str, Tensor]) -> CLIPVisionModelWithProjection:
    """A published picture tower, strictly.

    Raises:
        WeightsError: names are missing, or there are others.
    """
    kept = {
        name: x for name, x in tensors.items() if not name.endswith("position_ids")
    }  # old files count their positions
    try:
        tower = CLIPVisionModelWithProjection(clip_config(kept))
        tower.load_state_dict(kept)
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"this is no CLIP picture tower: {error}") from error
    return tower.eval().requires_grad_(False)


def center_square(image: Tensor, size: int) -> Tensor:
    """(3, H, W) -> (3, size, size): the shorter side fitted, the rest cut off evenly, as CLIP's processor does."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[None, :, top : top + side, left : left + side]
    return interpolate(square, size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
