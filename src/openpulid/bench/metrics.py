"""What the benchmark measures. Networks come in as plain callables; a measure gives one number per image.

Shapes: B images, P people, D features; images are (B, 3, H, W) floats in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


FindFaces = Callable[[Tensor], Faces]  # images (B, 3, H, W) -> Faces
EmbedImages = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> (B, D)
EmbedTexts = Callable[[Sequence[str]], Tensor]  # B prompts -> (B, D)
ReadAttributes = Callable[[Tensor], Mapping[str, Tensor]]  # images -> attribute: (B, classes) scores


def face_found(faces: Faces) -> Tensor:
    """(B,) 1 where the finder sees a face, else 0."""
    return faces.found.float()


def face_sim(faces: Faces, references: Tensor) -> Tensor:
    """Cosine of face embeddings, image against reference, by a recogniser that no method was trained with.

    PuLID's "Face Sim" (arXiv 2404.16022, section 4.1). An image without a face counts as 0: leaving it
    out would reward a method for destroying faces.

    Args:
        references: (B, D) embedding of each image's person, from their reference picture.

    Returns:
        (B,) in [-1, 1].
    """
    cosine = F.cosine_similarity(faces.embeddings.float(), references.float(), dim=-1)
    return torch.where(faces.found, cosine, torch.zeros_like(cosine))


def rank1(faces: Faces, gallery: Tensor, person: Tensor) -> Tensor:
    """Whether the right one of all people is the nearest: closed-set identification at rank 1.

    Phillips et al., "The FERET evaluation methodology" (2000). An image without a face is a miss.

    Args:
        gallery: (P, D) one reference embedding for each person.
        person: (B,) index into the gallery of who is meant.

    Returns:
        (B,) 1 or 0.
    """
    similarity = F.normalize(faces.embeddings.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T
    return ((similarity.argmax(dim=-1) == person) & faces.found).float()


def clip_t(embed_images: EmbedImages, embed_texts: EmbedTexts, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How well an image follows its prompt: 100 x cosine of CLIP image and text features.

    CLIPScore (Hessel et al. 2021) without its factor 2.5 and clipping, as PuLID's "CLIP-T" reports it.

    Returns:
        (B,) in [-100, 100].
    """
    return 100 * F.cosine_similarity(embed_images(images).float(), embed_texts(prompts).float(), dim=-1)


def clip_i(embed_images: EmbedImages, images: Tensor, before: Tensor) -> Tensor:
    """How little the identity changed the picture: cosine of CLIP features, with against without identity.

    PuLID's "CLIP-I" (arXiv 2404.16022, section 4.1): both images from the same prompt and the same noise.

    Returns:
        (B,) in [-1, 1]; 1 where nothing changed.
    """
    return F.cosine_similarity(embed_images(images).float(), embed_images(before).float(), dim=-1)


def outside_face(images: Tensor, before: Tensor, faces: Faces, faces_before: Faces) -> Tensor:
    """Mean absolute difference, with against without identity, over the pixels outside both images' faces.

    This project's own measure of what CLIP-I only suggests: the identity belongs in the face, so all that
    moves elsewhere is a disturbance. Pixels of either face are left out, so a face may change its outline.

    Returns:
        (B,) in [0, 1]; 0 where nothing moved.
    """
    outside = 1 - torch.maximum(faces.masks, faces_before.masks).float()
    difference = (images.float() - before.float()).abs().mean(dim=1, keepdim=True)
    area = outside.sum(dim=(1, 2, 3))
    return (difference * outside).sum(dim=(1, 2, 3)) / area.clamp(min=1)


def attributes(read: ReadAttributes, images: Tensor, wanted: Sequence[Mapping[str, int]]) -> Tensor:
    """Share of what the prompt asks for that an attribute reader sees in the image.

    Attribute accuracy as in compositional text-to-image benchmarks (GenEval, Ghosh et al. 2023), with a
    classifier for each attribute in place of an object detector.

    Args:
        wanted: for each image, attribute -> class index; attributes not named do not count.

    Returns:
        (B,) in [0, 1]; NaN where nothing is asked.
    """
    seen = {name: scores.argmax(dim=-1).tolist() for name, scores in read(images).items()}
    shares = [
        sum(seen[name][k] == value for name, value in asked.items()) / len(asked) if asked else float("nan")
        for k, asked in enumerate(wanted)
    ]
    return torch.tensor(shares)


@dataclass(frozen=True)
class Interval:
    """A mean and the range that it would fall into in 95 of 100 repetitions with other people."""

    mean: float
    low: float
    high: float


def bootstrap(values: Tensor, groups: Tensor, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean with a 95% percentile bootstrap interval over people (Efron 1979; cluster bootstrap).

    Images of one person are alike, so people, not images, are drawn again; every person weighs the same.

    Args:
        values: (B,) one number per image; NaN is left out.
        groups: (B,) whose image it is.

    Returns:
        the mean over people of their own means; NaN throughout where no value is left.
    """
    kept = ~values.isnan()
    means = [values[kept & (groups == group)].double().mean() for group in groups[kept].unique()]
    if not means:
        return Interval(float("nan"), float("nan"), float("nan"))
    people = torch.stack(means)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(people), (resamples, len(people)), generator=generator)
    low, high = people[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(people.mean().item(), low, high)
