"""Inputs of the metrics: the images of one method and everything they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Output = TypeVar("Output")


@dataclass(frozen=True)
class Faces:
    """The face detections and embeddings of a batch of images.

    Attributes:
        has_face: (B,) bool, whether the image shows a face.
        embeddings: (B, D) face embeddings; rows without a face are undefined.
        masks: (B, 1, H, W), one on the pixels of the face, zero elsewhere.
    """

    has_face: Tensor
    embeddings: Tensor
    masks: Tensor

    def select(self, rows: Tensor) -> Faces:
        """Return the faces of the images with these indices."""
        return Faces(self.has_face[rows], self.embeddings[rows], self.masks[rows])


DetectFaces = Callable[[Tensor], Faces]
"""Images (B, 3, H, W) -> Faces."""

EmbedImages = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> embeddings (B, D)."""

EmbedTexts = Callable[[Sequence[str]], Tensor]
"""B prompts -> embeddings (B, D)."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images (B, 3, H, W) -> distances (B,)."""

ClassifyAttributes = Callable[[Tensor], Mapping[str, Tensor]]
"""Images (B, 3, H, W) -> attribute name -> class scores (B, C)."""


@dataclass(frozen=True)
class MetricInputs:
    """B images of one method, each generated from a prompt, a seed and a reference image.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        base_images: (B, 3, H, W), the base model's images for the same prompts and seeds.
        faces: the faces of `images`.
        base_faces: the faces of `base_images`.
        subjects: (B,) index of each image's subject among the P subjects.
        reference_images: (P, 3, h, w), the image that each identity was extracted from.
        reference_faces: the faces of `reference_images`.
        prompts: the B prompts.
        requested: for each image, attribute name -> class index that its prompt asks for.
        second_faces: the faces of another image of each image's subject (B rows), which no
            method has seen; None if there are no such images.
        facial_values: (P, V), the true facial parameters of the subjects; None for photos.
        outputs: network -> its output for `images`, see `apply`.
        base_outputs: network -> its output for `base_images`, see `apply_to_base`.
    """

    images: Tensor
    base_images: Tensor
    faces: Faces
    base_faces: Faces
    subjects: Tensor
    reference_images: Tensor
    reference_faces: Faces
    prompts: Sequence[str]
    requested: Sequence[Mapping[str, int]] = field(default=())
    second_faces: Faces | None = None
    facial_values: Tensor | None = None
    outputs: dict[Callable[[Tensor], Any], Any] = field(default_factory=dict, repr=False)
    base_outputs: dict[Callable[[Tensor], Any], Any] = field(default_factory=dict, repr=False)

    def apply(self, network: Callable[[Tensor], Output]) -> Output:
        """Apply a network to `images`; metrics that share the network share its output."""
        if network not in self.outputs:
            self.outputs[network] = network(self.images)
        output: Output = self.outputs[network]
        return output

    def apply_to_base(self, network: Callable[[Tensor], Output]) -> Output:
        """Apply a network to `base_images`; metrics that share the network share its output."""
        if network not in self.base_outputs:
            self.base_outputs[network] = network(self.base_images)
        output: Output = self.base_outputs[network]
        return output


class Metric(Protocol):
    """One number per image; NaN where the metric is undefined.

    Attributes:
        name: the column's name.
        higher_is_better: the direction of the metric.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric, (B,) in float32."""


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Compute cosine similarities in float32, (..., D) and (..., D) -> (...)."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def crop_squares(images: Tensor, faces: Faces, size: int) -> Tensor:
    """Crop the square around each face mask; use the whole image where there is no face.

    Args:
        images: (B, 3, H, W) in [0, 1].
        faces: their faces.
        size: side of the crops in pixels.

    Returns:
        (B, 3, size, size), padded with gray.
    """
    height, width = images.shape[-2:]
    crops = []
    for image, mask in zip(images.float(), faces.masks, strict=True):
        pixels = mask[0].nonzero()
        if len(pixels):
            top, left = pixels.amin(0).tolist()
            bottom, right = (pixels.amax(0) + 1).tolist()
        else:
            top, left, bottom, right = 0, 0, height, width
        crop = image[None, :, top:bottom, left:right]
        crop_height, crop_width = crop.shape[-2:]
        side = max(crop_height, crop_width)
        pad_top = (side - crop_height) // 2
        pad_left = (side - crop_width) // 2
        padding = (
            pad_left, side - crop_width - pad_left, pad_top, side - crop_height - pad_top
        )  # fmt: skip
        crop = F.pad(crop, padding, value=0.5)
        crops.append(
            F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)
        )
    return torch.cat(crops)
