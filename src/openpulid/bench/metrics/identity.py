"""Whether it is the person."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from openpulid.bench.metrics.inputs import Distance, EmbedImages, MetricInputs, cosine, face_crops


class FaceFound:
    """1 where the finder sees a face, else 0: the detection rate."""

    name: ClassVar[str] = "face_found"
    higher: ClassVar[bool] = True

    def __call__(self, evidence: MetricInputs) -> Tensor:
        return evidence.seen.found.float()


class FaceSim:
    """Cosine of face embeddings, image against portrait, by a recogniser that no method was trained with.

    PuLID's "Face Sim" (arXiv 2404.16022, section 4.1). An image without a face counts as 0: leaving it out would reward a
    method for destroying faces.
    """

    name: ClassVar[str] = "face_sim"
    higher: ClassVar[bool] = True

    def __call__(self, evidence: MetricInputs) -> Tensor:
        seen = evidence.seen
        similar = cosine(seen.embeddings, evidence.gallery.embeddings[evidence.person])
        return torch.where(seen.found, similar, torch.zeros_like(similar))


class Rank1:
    """Whether the right one of all people is the nearest: closed-set identification at rank 1.

    Phillips et al., "The FERET evaluation methodology" (2000). An image without a face is a miss.
    """

    name: ClassVar[str] = "rank1"
    higher: ClassVar[bool] = True

    def __call__(self, evidence: MetricInputs) -> Tensor:
        seen, gallery = evidence.seen, evidence.gallery
        similar = (
            F.normalize(seen.embeddings.float(), dim=-1)
            @ F.normalize(gallery.embeddings.float(), dim=-1).T
        )
        return ((similar.argmax(dim=-1) == evidence.person) & seen.found).float()


class CopyPaste:
    """(angle(image, other) - angle(image, portrait)) / max(angle(other, portrait), eps): whether the portrait is repeated.

    Copy-Paste of MultiID-Bench (arXiv 2510.14975), between the angles of face embeddings; -1 to 1. Likeness to the
    portrait alone rewards pasting it: this compares with likeness to another picture of the same person. NaN where there
    is no such picture, or no face.
    """

    name: ClassVar[str] = "copy_paste"
    higher: ClassVar[bool] = False
    eps: ClassVar[float] = 1e-3

    def __call__(self, evidence: MetricInputs) -> Tensor:
        seen, other = evidence.seen, evidence.others
        nothing = torch.full((len(seen.found),), float("nan"))
        if other is None:
            return nothing
        portrait = evidence.gallery.embeddings[evidence.person]
        apart = _angle(other.embeddings, portrait).clamp(min=self.eps)
        pasted = (
            _angle(seen.embeddings, other.embeddings) - _angle(seen.embeddings, portrait)
        ) / apart
        return torch.where(seen.found & other.found, pasted, nothing)


class FacialValues:
    """Mean absolute error of the person's own numbers, read back from the image: 0 is the very person.

    This project's own, for people who are drawn from numbers: how wide the nose is, and so on, each from 0 to 1. A reader
    makes errors too: those on pictures of the person themselves are the best that can be had, and saying the mean person
    each time the worst. NaN where the image shows no face or nobody knows the numbers.

    Args:
        read: face embeddings (B, D) -> (B, V).
    """

    name: ClassVar[str] = "values"
    higher: ClassVar[bool] = False

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        self.read = read

    def __call__(self, evidence: MetricInputs) -> Tensor:
        nothing = torch.full((len(evidence.images),), float("nan"))
        if evidence.truth is None:
            return nothing
        error = (
            (self.read(evidence.seen.embeddings) - evidence.truth[evidence.person]).abs().mean(-1)
        )
        return torch.where(evidence.seen.found, error, nothing)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    return cosine(a, b).clamp(-1, 1).arccos()


class FGIS:
    """Cosine of DINO embeddings of the facial regions of image and portrait.

    Fine-Grained Identity Similarity of ConsistentID (arXiv 2404.16771, section 4.1); its DINO is ViT-S/16. NaN where the
    image shows no face.

    Args:
        dino: face crops (B, 3, size, size) in [0, 1] -> (B, D).
        size: of the crops.
    """

    name: ClassVar[str] = "fgis"
    higher: ClassVar[bool] = True

    def __init__(self, dino: EmbedImages, size: int = 224) -> None:
        self.dino, self.size = dino, size

    def __call__(self, evidence: MetricInputs) -> Tensor:
        shown = self.dino(face_crops(evidence.images, evidence.seen, self.size))
        people, place = evidence.person.unique(return_inverse=True)
        portraits = self.dino(
            face_crops(evidence.portraits[people], evidence.gallery.rows(people), self.size)
        )
        similar = cosine(shown, portraits[place]).cpu()
        return torch.where(
            evidence.seen.found.cpu(), similar, torch.full_like(similar, float("nan"))
        )


class FaceDiversity:
    """Mean LPIPS distance of an image's face to the other faces of the same person: "Face Div" of PhotoMaker.

    PhotoMaker (arXiv 2312.04461, section 4.1) averages over pairs; so does the mean of these numbers over a person's images.
    NaN where the person has no second image with a face.

    Args:
        lpips: two batches of crops (B, 3, size, size) in [0, 1] -> (B,).
        size: of the crops.
    """

    name: ClassVar[str] = "face_div"
    higher: ClassVar[bool] = True

    def __init__(self, lpips: Distance, size: int = 128) -> None:
        self.lpips, self.size = lpips, size

    def __call__(self, evidence: MetricInputs) -> Tensor:
        crops, found = face_crops(evidence.images, evidence.seen, self.size), evidence.seen.found
        values = torch.full((len(crops),), float("nan"))
        for row in range(len(crops)):
            same = (evidence.person == evidence.person[row]) & found
            same[row] = False
            if found[row] and same.any():
                values[row] = (
                    self.lpips(
                        crops[row : row + 1].expand(int(same.sum()), -1, -1, -1), crops[same]
                    )
                    .mean()
                    .cpu()
                )
        return values
