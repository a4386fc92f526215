"""Pictures to face embeddings, differentiable in the pictures: what an ID loss teaches through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openpulid.faces.align import align_faces
from openpulid.faces.face import Face
from openpulid.faces.mini_recognition import CROP

Detect = Callable[
    [Tensor], Sequence[Face | None]
]  # (B, 3, H, W) in [0, 1] -> a face or None for each
Crop = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # images, masks (B, 1, H, W), landmarks (B, 5, 2) -> crops


@dataclass(frozen=True)
class FaceEmbeddings:
    """What was seen in B pictures.

    Attributes:
        found: (B,) bool, whether there is a face.
        embeddings: (B, D) of the recogniser, zero where there is none.
        masks: (B, 1, H, W), one on the face's own pixels, where the finder knows them.
    """

    found: Tensor
    embeddings: Tensor
    masks: Tensor


def crop_masked(images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
    """Everything but the face gray, as the miniature's recognisers want it."""
    return align_faces(images, masks, landmarks, CROP)


class FaceEmbedder:
    """A finder, a crop and a recogniser. Where the face is carries no gradient, what it looks like does.

    Args:
        find: picture -> `Face` or None, such as `FaceFinder.find`; runs without gradient.
        recogniser: crops -> (B, D); frozen here.
        crop: a differentiable warp of the pictures into the recogniser's template.
    """

    def __init__(self, find: Detect, recogniser: nn.Module, crop: Crop = crop_masked) -> None:
        self.find, self.recogniser, self.crop = find, recogniser.eval().requires_grad_(False), crop

    def __call__(self, images: Tensor) -> FaceEmbeddings:
        """(B, 3, H, W), clamped to [0, 1] here."""
        images = images.clamp(0, 1)
        with torch.no_grad():
            faces = self.find(images.detach())
        found = torch.tensor([face is not None for face in faces], device=images.device)
        masks = images.new_zeros(len(images), 1, *images.shape[2:])
        for row, face in zip(masks, faces, strict=True):
            if face is not None and face.mask is not None:
                row.copy_(face.mask)
        marks = [face.landmarks for face in faces if face is not None]
        if not marks:
            return FaceEmbeddings(
                found, 0 * images.mean((1, 2, 3))[:, None], masks
            )  # still a function of the pictures
        some = self.recogniser(
            self.crop(images[found], masks[found], torch.stack(marks).to(images))
        ).float()
        embeddings = some.new_zeros(len(images), some.shape[1]).index_put(
            (found.nonzero()[:, 0],), some
        )
        return FaceEmbeddings(found, embeddings, masks)
