"""Face embeddings that are differentiable in the images, as an ID loss needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openpulid.faces.align import align_faces
from openpulid.faces.face import Face, first_usable
from openpulid.faces.miniature import CROP

# (B, 3, H, W) in [0, 1] -> a face or None for each image
Detect = Callable[[Tensor], Sequence[Face | None]]
# images (B, 3, H, W), masks (B, 1, H, W), landmarks (B, 5, 2) -> crops
Crop = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FaceEmbeddings:
    """The faces of B images.

    Attributes:
        has_face: (B,) bool, whether a face was detected.
        embeddings: (B, D) of the face recognition model; zero where there is no face.
        masks: (B, 1, H, W), one on the pixels of the face, if the detector returns masks.
    """

    has_face: Tensor
    embeddings: Tensor
    masks: Tensor


def crop_masked(images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
    """Crop faces for the miniature's face recognition models: all but the face is gray."""
    return align_faces(images, masks, landmarks, CROP)


class FaceEmbedder:
    """Detects, crops and embeds the faces of images.

    The position of the face carries no gradient, its appearance does.

    Args:
        detect: images -> a `Face` or None each, such as `MiniFaceDetector.detect`; runs without
            gradient.
        recognition: crops -> (B, D); it is frozen.
        crop: differentiable warp of the images to the template of the face recognition model.
    """

    def __init__(self, detect: Detect, recognition: nn.Module, crop: Crop = crop_masked) -> None:
        self.detect = detect
        self.recognition = recognition.eval().requires_grad_(False)
        self.crop = crop

    def __call__(self, images: Tensor) -> FaceEmbeddings:
        """Embed the faces of images (B, 3, H, W), which are clamped to [0, 1]."""
        images = images.clamp(0, 1)
        with torch.no_grad():
            faces = self.detect(images.detach())
        # a crop of a face without usable landmarks would not be finite
        faces = [first_usable([face] if face else []) for face in faces]
        has_face = torch.tensor([face is not None for face in faces], device=images.device)
        masks = images.new_zeros(len(images), 1, *images.shape[2:])
        for mask, face in zip(masks, faces, strict=True):
            if face is not None and face.mask is not None:
                mask.copy_(face.mask)
        landmarks = [face.landmarks for face in faces if face is not None]
        if not landmarks:
            # Zeros that are still a function of the images, so that backward works.
            zeros = 0 * images.mean((1, 2, 3))[:, None]
            return FaceEmbeddings(has_face, zeros, masks)

        points = torch.stack(landmarks).to(images)
        crops = self.crop(images[has_face], masks[has_face], points)
        values = self.recognition(crops).float()
        rows = has_face.nonzero()[:, 0]
        embeddings = values.new_zeros(len(images), values.shape[1]).index_put((rows,), values)
        return FaceEmbeddings(has_face, embeddings, masks)
