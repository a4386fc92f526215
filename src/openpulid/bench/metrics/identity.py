"""Metrics of identity: whether the image shows the subject."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from openpulid.bench.metrics.inputs import Distance, EmbedImages, MetricInputs, cosine, crop_faces
from openpulid.faces.embed import copy_paste


class FaceFound:
    """Face detection rate: 1 if the detector finds a face, else 0."""

    name: ClassVar[str] = "face_found"
    higher_is_better: ClassVar[bool] = True

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        return inputs.faces.has_face.float()


class FaceSim:
    """Cosine similarity of the face embeddings of image and reference image.

    PuLID's "Face Sim" (arXiv 2404.16022, section 4.1). The face recognition model is one that no
    method was trained with. An image without a face counts as 0: ignoring it would reward a
    method for destroying faces. NaN for a subject without a face in the reference image.
    """

    name: ClassVar[str] = "face_sim"
    higher_is_better: ClassVar[bool] = True

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        references = inputs.reference_faces.embeddings[inputs.subjects]
        similarity = cosine(inputs.faces.embeddings, references)
        similarity = torch.where(inputs.faces.has_face, similarity, torch.zeros_like(similarity))
        return _of_known_subjects(similarity, inputs)


class Rank1:
    """Closed-set identification at rank 1: whether the subject is the nearest of all subjects.

    Phillips et al., "The FERET evaluation methodology" (2000). An image without a face is a miss.
    A subject without a face in the reference image is not in the gallery, and NaN.
    """

    name: ClassVar[str] = "rank1"
    higher_is_better: ClassVar[bool] = True

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        nearest = _compare_with_gallery(inputs).argmax(dim=-1)
        is_hit = (nearest == inputs.subjects) & inputs.faces.has_face
        return _of_known_subjects(is_hit.float(), inputs)


class Rank1Of8:
    """Probability that the subject is the nearest of eight subjects, seven of them at random.

    The expected rank-1 rate of Phillips et al. (2000) in a gallery of eight: with k of the n other
    subjects nearer than the own one it is C(n - k, 7) / C(n, 7). With fewer than eight subjects it
    is that of all of them. An image without a face is a miss. A subject without a face in the
    reference image is not in the gallery, and NaN.
    """

    name: ClassVar[str] = "rank1_of_8"
    higher_is_better: ClassVar[bool] = True

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        cosines = _compare_with_gallery(inputs)
        own = cosines.gather(1, inputs.subjects[:, None])
        others = max(int(inputs.reference_faces.has_face.sum()) - 1, 0)
        drawn = min(7, others)
        probabilities = [
            math.comb(max(others - nearer, 0), drawn) / math.comb(others, drawn)
            for nearer in (cosines > own).sum(1).tolist()
        ]
        has_face = inputs.faces.has_face
        values = torch.tensor(probabilities, device=has_face.device) * has_face
        return _of_known_subjects(values, inputs)


class SimGT:
    """Cosine similarity of the face embeddings of image and second image of the subject.

    "Sim(GT)" of MultiID-Bench (arXiv 2510.14975): a copy of the reference image gains nothing. An
    image without a face counts as 0; NaN without a second image.
    """

    name: ClassVar[str] = "sim_gt"
    higher_is_better: ClassVar[bool] = True

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        faces = inputs.faces
        second = inputs.second_faces
        if second is None:
            return torch.full((len(faces.has_face),), float("nan"))
        similarity = cosine(faces.embeddings, second.embeddings)
        values = torch.where(faces.has_face, similarity, torch.zeros_like(similarity))
        return torch.where(second.has_face, values, torch.full_like(values, float("nan")))


class CopyPaste:
    """Whether the reference image is copied instead of the identity, see `faces.embed.copy_paste`.

    NaN without a second image, or without a face in one of the three.
    """

    name: ClassVar[str] = "copy_paste"
    higher_is_better: ClassVar[bool] = False

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        faces = inputs.faces
        second = inputs.second_faces
        undefined = torch.full((len(faces.has_face),), float("nan"))
        if second is None:
            return undefined
        references = inputs.reference_faces.embeddings[inputs.subjects]
        values = copy_paste(faces.embeddings, second.embeddings, references)
        values = torch.where(faces.has_face & second.has_face, values, undefined)
        return _of_known_subjects(values, inputs)


class FacialValues:
    """Mean absolute error of the subject's facial parameters, predicted from the image.

    This project's own metric for synthetic people, whose faces are rendered from parameters in
    [0, 1], such as the width of the nose. 0 means the same face. The predictor has an error of its
    own: its error on images of the true subject is the lower bound, the error of always predicting
    the mean face is the upper one. NaN if the image shows no face or the parameters are unknown.

    Args:
        read: images (B, 3, H, W) in [0, 1] -> facial parameters (B, V).
    """

    name: ClassVar[str] = "values"
    higher_is_better: ClassVar[bool] = False

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        self.read = read

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        undefined = torch.full((len(inputs.images),), float("nan"))
        if inputs.facial_values is None:
            return undefined
        predicted = self.read(inputs.images)
        error = (predicted - inputs.facial_values[inputs.subjects]).abs().mean(-1)
        return torch.where(inputs.faces.has_face, error, undefined)


class FGIS:
    """Cosine similarity of the DINO embeddings of the facial regions of image and reference image.

    Fine-Grained Identity Similarity of ConsistentID (arXiv 2404.16771, section 4.1), whose DINO
    is ViT-S/16. NaN where the image or the reference image shows no face.

    Args:
        dino: face crops (B, 3, size, size) in [0, 1] -> (B, D).
        size: side of the crops in pixels.
    """

    name: ClassVar[str] = "fgis"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, dino: EmbedImages, size: int = 224) -> None:
        self.dino = dino
        self.size = size

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        embeddings = self.dino(crop_faces(inputs.images, inputs.faces, self.size))
        subjects, indices = inputs.subjects.unique(return_inverse=True)
        reference_crops = crop_faces(
            inputs.reference_images[subjects], inputs.reference_faces.select(subjects), self.size
        )
        similarity = cosine(embeddings, self.dino(reference_crops)[indices]).cpu()
        undefined = torch.full_like(similarity, float("nan"))
        similarity = torch.where(inputs.faces.has_face.cpu(), similarity, undefined)
        return _of_known_subjects(similarity, inputs)


class FaceDiversity:
    """Mean LPIPS distance of an image's face to the subject's other faces.

    "Face Div" of PhotoMaker (arXiv 2312.04461, section 4.1), which averages over pairs, as the
    mean of these numbers over a subject's images does. NaN where the subject has no second image
    with a face.

    Args:
        lpips: two batches of crops (B, 3, size, size) in [0, 1] -> (B,).
        size: side of the crops in pixels.
    """

    name: ClassVar[str] = "face_div"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, lpips: Distance, size: int = 128) -> None:
        self.lpips = lpips
        self.size = size

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        has_face = inputs.faces.has_face
        crops = crop_faces(inputs.images, inputs.faces, self.size)
        values = torch.full((len(crops),), float("nan"))
        for row in range(len(crops)):
            same_subject = (inputs.subjects == inputs.subjects[row]) & has_face
            same_subject[row] = False
            if has_face[row] and same_subject.any():
                crop = crops[row : row + 1].expand(int(same_subject.sum()), -1, -1, -1)
                values[row] = self.lpips(crop, crops[same_subject]).mean().cpu()
        return values


def _compare_with_gallery(inputs: MetricInputs) -> Tensor:
    """Return the cosines (B, S) of the face embeddings of images and all reference images.

    They are -inf for subjects without a face in the reference image.
    """
    embeddings = F.normalize(inputs.faces.embeddings.float(), dim=-1)
    references = F.normalize(inputs.reference_faces.embeddings.float(), dim=-1)
    cosines = embeddings @ references.T
    cosines[:, ~inputs.reference_faces.has_face] = -math.inf
    return cosines


def _of_known_subjects(values: Tensor, inputs: MetricInputs) -> Tensor:
    """Return the values (B,), NaN for a subject without a face in the reference image.

    No method can show a subject whose face the scorer does not find.
    """
    is_known = inputs.reference_faces.has_face[inputs.subjects].to(values.device)
    return torch.where(is_known, values, torch.full_like(values, math.nan))
