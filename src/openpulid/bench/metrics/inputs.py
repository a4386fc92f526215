"""What the measures look at: one method's images and all that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Faces:
    """What a face finder and a recogniser see in a batch of images.

    Attributes:
        found: (B,) bool, whether there is a face.
        embeddings: (B, D) of the recogniser; rows without a face hold anything.
        masks: (B, 1, H, W) one on the face's own pixels, zero everywhere where there is no face.
    """

    found: Tensor
    embeddings: Tensor
    masks: Tensor

    def rows(self, rows: Tensor) -> Faces:
        """Those of some images."""
        return Faces(self.found[rows], self.embeddings[rows], self.masks[rows])


FindFaces = Callable[[Tensor], Faces]  # images (B, 3, H, W) -> Faces
EmbedImages = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> (B, D)
EmbedTexts = Callable[[Sequence[str]], Tensor]  # B prompts -> (B, D)
Distance = Callable[[Tensor, Tensor], Tensor]  # two batches of images (B, 3, H, W) -> (B,)
ReadAttributes = Callable[
    [Tensor], Mapping[str, Tensor]
]  # images -> attribute: (B, classes) scores


@dataclass(frozen=True)
class MetricInputs:
    """B images of one method, each from a prompt, a seed and the picture of a person.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        before: (B, 3, H, W), the base model's from the same prompt and noise.
        seen, was: the faces of both.
        person: (B,) whose identity it is, a row of the gallery.
        portraits: (P, 3, h, w), the picture that each person's identity was made from; gallery: its faces.
        prompts: B sentences.
        wanted: for each image, attribute -> class that the prompt asks for; where that is known.
        others: the faces of another picture of each image's person, B of them; where there is one.
        truth: (P, V), what is known of the people exactly; of procedural ones their facial values.
    """

    images: Tensor
    before: Tensor
    seen: Faces
    was: Faces
    person: Tensor
    portraits: Tensor
    gallery: Faces
    prompts: Sequence[str]
    wanted: Sequence[Mapping[str, int]] = field(default=())
    others: Faces | None = None
    truth: Tensor | None = None


class Metric(Protocol):
    """One number for each image; NaN where it cannot be told."""

    name: ClassVar[str]
    higher: ClassVar[bool]  # whether more is better

    def __call__(self, evidence: MetricInputs) -> Tensor:
        """(B,) in float32."""


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(..., D) and (..., D) -> (...) in [-1, 1], in float32."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def face_crops(images: Tensor, faces: Faces, size: int) -> Tensor:
    """(B, 3, size, size): the square around each face's pixels; the whole image where there is no face."""
    height, width = images.shape[-2:]
    crops = []
    for image, mask in zip(images.float(), faces.masks, strict=True):
        places = mask[0].nonzero()
        if len(places):
            (top, left), (bottom, right) = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
        else:
            top, left, bottom, right = 0, 0, height, width
        crop = image[None, :, top:bottom, left:right]
        tall, wide = crop.shape[-2:]
        side = max(tall, wide)
        above, before = (side - tall) // 2, (side - wide) // 2
        crop = F.pad(crop, (before, side - wide - before, above, side - tall - above), value=0.5)
        crops.append(
            F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)
        )
    return torch.cat(crops)
