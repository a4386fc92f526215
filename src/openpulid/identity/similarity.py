"""How similar faces are, and whether reference images show one person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity


@runtime_checkable
class HasFaceRecognition(Protocol):
    """An identity extractor whose features begin with the embedding of a face recognition model.

    Attributes:
        same_person_similarity: cosine similarity of two embeddings from which they are of one
            person.
    """

    same_person_similarity: float

    @property
    def recognition_width(self) -> int:
        """Width of the face embedding, the first part of `id_cond`."""


def describe_strangers(
    extractor: HasFaceRecognition, identities: Sequence[Identity], labels: Sequence[str]
) -> list[str]:
    """Describe in a sentence each image that seems to show another person than most images.

    Args:
        extractor: produced the identities.
        identities: one per image.
        labels: the names of the images.
    """
    width = extractor.recognition_width
    if not width:
        return []
    embeddings = torch.cat([identity.id_cond[0, :1, :width] for identity in identities])
    similarities = compute_similarities(embeddings)
    subject = find_subject(similarities, extractor.same_person_similarity)
    notes = []
    for index, label in enumerate(labels):
        if index not in subject:
            closest = max(subject, key=lambda k: float(similarities[index, k]))
            notes.append(
                f"{label}: looks like another person than {labels[closest]} (similarity "
                f"{similarities[index, closest]:.2f}, one person has at least "
                f"{extractor.same_person_similarity}); use images of one person, or "
                "give each person a mask to show several."
            )
    return notes


def compare_identities(extractor: object, one: Identity, other: Identity) -> float:
    """Compute the cosine similarity of the faces of two identities.

    Of an identity with several images, the mean of the normalized face embeddings counts.

    Args:
        extractor: produced both identities.
        one: an identity.
        other: another one.

    Raises:
        OptionError: the features of the extractor have no face embedding.
    """
    width = extractor.recognition_width if isinstance(extractor, HasFaceRecognition) else 0
    if not width:
        raise OptionError(
            "this method has no face recognition model, so it cannot compare faces; use a preset "
            "with PuLID."
        )
    faces = [normalize(x.id_cond[0, :, :width].float().cpu(), dim=-1).mean(0) for x in (one, other)]
    return float(compute_similarities(torch.stack(faces))[0, 1])


def compute_similarities(embeddings: Tensor) -> Tensor:
    """Compute the cosine similarities (n, n) of embeddings (n, C)."""
    directions = normalize(embeddings.float(), dim=-1)
    return directions @ directions.T


def find_subject(similarities: Tensor, threshold: float) -> list[int]:
    """Find the person in most images; if several are in as many, the one in the earliest image.

    Two images show one person if they are similar, or if a chain of similar images connects them.

    Args:
        similarities: (n, n).
        threshold: similarity from which two images show one person.

    Returns:
        The indices of the person's images.
    """
    remaining = list(range(len(similarities)))
    largest: list[int] = []
    while remaining:
        group = [remaining.pop(0)]
        for index in group:  # it grows while similar images are appended
            similar = [k for k in remaining if similarities[index, k] >= threshold]
            group += similar
            remaining = [k for k in remaining if k not in similar]
        if len(group) > len(largest):
            largest = group
    return largest
