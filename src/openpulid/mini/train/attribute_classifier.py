"""Training and evaluation of the attribute classifier, which scores prompt adherence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from openpulid.faces.augment import degrade
from openpulid.io.image_grid import captioned_grid, to_pil
from openpulid.mini.data import load_faces
from openpulid.mini.models import AttributeClassifier
from openpulid.training import StepRNG, generator_for
from openpulid.world import ATTRIBUTES, WorldDataset


class AttributeHeads(nn.Module):
    """One linear head per attribute on an embedding.

    CLIP trains with these heads, so that its embeddings contain all that captions describe.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(classes)) for name, classes in ATTRIBUTES.items()}
        )

    def forward(self, embedding: Tensor) -> dict[str, Tensor]:
        """Compute the scores (B, classes) of each attribute from embeddings (B, D)."""
        return {name: head(embedding).float() for name, head in self.heads.items()}


class AttributeClassifierTask:
    """Trains an `AttributeClassifier`; a `training.trainer.Task`.

    Args:
        classifier: the network.
        data: training images.
        held_out: evaluation images; None disables validation.
        batch: images per step.
    """

    def __init__(
        self,
        classifier: AttributeClassifier,
        data: WorldDataset,
        held_out: WorldDataset | None = None,
        batch: int = 96,
    ) -> None:
        self.classifier = classifier.to(memory_format=torch.channels_last)
        self.data = data
        self.held_out = held_out
        self.batch = batch

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the classifier."""
        return {"classifier": self.classifier}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the attribute loss on degraded images."""
        rows = rng.indices(len(self.data), self.batch).numpy()
        device = next(self.classifier.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, _, _ = load_faces(self.data, rows, device)
            images = degrade(images, generator_for(rng.seed, rng.step, rng.rank))
        attributes = torch.from_numpy(self.data.attributes[rows].astype(np.int64)).to(device)
        scores = self.classifier(images.contiguous(memory_format=torch.channels_last))
        return {"attributes": attribute_loss(scores, attributes)}

    def validate(self) -> Mapping[str, float]:
        """Measure the accuracy on held-out people."""
        return evaluate_classifier(self.classifier, self.held_out) if self.held_out else {}

    def sheet(self) -> Image.Image | None:
        """Draw mistakes on held-out people."""
        return draw_mistakes(self.classifier, self.held_out) if self.held_out else None


@torch.no_grad()
def draw_mistakes(
    classifier: AttributeClassifier, data: WorldDataset, candidates: int = 256, limit: int = 18
) -> Image.Image:
    """Draw images with their misclassified attributes as captions.

    Args:
        classifier: the network.
        data: held-out images.
        candidates: number of images to classify, spread evenly over the data.
        limit: number of images to draw, those with most mistakes first.
    """
    rows = np.linspace(0, len(data) - 1, min(candidates, len(data))).astype(np.int64)
    images, _, _ = load_faces(data, rows, next(classifier.parameters()).device)
    predictions = {name: scores.argmax(-1).tolist() for name, scores in classifier(images).items()}
    captioned = []
    for index, image in enumerate(to_pil(images)):
        targets = dict(zip(ATTRIBUTES, data.attributes[rows[index]].tolist(), strict=True))
        mistakes = [
            f"{name}: {classes[targets[name]]}, predicted {classes[predictions[name][index]]}"
            for name, classes in ATTRIBUTES.items()
            if targets[name] >= 0 and targets[name] != predictions[name][index]
        ]
        captioned.append((image, "; ".join(mistakes)))
    captioned.sort(key=lambda pair: -len(pair[1]))
    return captioned_grid(captioned[:limit])


def attribute_loss(scores: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Compute the cross-entropy, averaged over the attributes.

    Args:
        scores: (B, classes) for each attribute.
        targets: (B, A) class indices in the order of `ATTRIBUTES`; -1 marks what is not visible.
    """
    losses = []
    for column, name in enumerate(ATTRIBUTES):
        visible = (targets[:, column] >= 0).sum().clamp(min=1)
        loss = cross_entropy(scores[name], targets[:, column], ignore_index=-1, reduction="sum")
        losses.append(loss / visible)
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate_classifier(
    classifier: AttributeClassifier, data: WorldDataset, limit: int = 1024
) -> dict[str, float]:
    """Measure the accuracy of each attribute on images of held-out people.

    Args:
        classifier: the network.
        data: held-out images.
        limit: maximum number of images, spread evenly over the data.

    Returns:
        The accuracy of each attribute, their `mean` and the lowest (`least`).
    """
    device = next(classifier.parameters()).device
    rows = np.linspace(0, len(data) - 1, min(limit, len(data))).astype(np.int64)
    correct = []
    for chunk in np.array_split(rows, max(1, len(rows) // 64)):
        images, _, _ = load_faces(data, chunk, device)
        targets = torch.from_numpy(data.attributes[chunk].astype(np.int64)).to(device)
        correct.append(mark_correct(classifier(images), targets))
    accuracies = compute_accuracy(torch.cat(correct))
    return {
        "mean": sum(accuracies.values()) / len(accuracies),
        "least": min(accuracies.values()),
        **accuracies,
    }


def mark_correct(scores: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Compare the highest-scoring classes with the targets.

    Args:
        scores: (B, classes) for each attribute.
        targets: (B, A) class indices; -1 marks what is not visible.

    Returns:
        (B, A) one if the class is correct, zero if it is wrong, NaN if it is not visible.
    """
    best = torch.stack([scores[name].argmax(-1) for name in ATTRIBUTES], 1)
    return torch.where(targets >= 0, (best == targets).float(), torch.nan)


def compute_accuracy(correct: Tensor) -> dict[str, float]:
    """Compute the accuracy of each attribute from the marks (N, A) of `mark_correct`.

    Attributes that are visible in no image are left out.
    """
    return {
        name: value
        for name, value in zip(ATTRIBUTES, correct.nanmean(0).tolist(), strict=True)
        if not np.isnan(value)
    }
