"""Training and examination of the attribute reader, the judge of prompts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from openpulid.io.image_grid import captioned_grid, to_pil
from openpulid.mini.data.augment import augment
from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.train.recognition import faces_of
from openpulid.training.rng import StepRNG, generator_for
from openpulid.world import ATTRIBUTES
from openpulid.world.dataset import WorldDataset


class AttributeHeads(nn.Module):
    """One linear head per attribute on an embedding; teaches the picture tower what sentences speak of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(classes)) for name, classes in ATTRIBUTES.items()}
        )

    def forward(self, seen: Tensor) -> dict[str, Tensor]:
        """(B, D) -> attribute name -> (B, classes)."""
        return {name: head(seen).float() for name, head in self.heads.items()}


class AttributeClassifierTask:
    """Trains an `AttributeClassifier`; a `training.loop.Task`."""

    def __init__(
        self,
        reader: AttributeClassifier,
        data: WorldDataset,
        held_out: WorldDataset | None = None,
        batch: int = 96,
    ) -> None:
        self.reader = reader.to(memory_format=torch.channels_last)
        self.data, self.held_out, self.batch = data, held_out, batch

    def modules(self) -> Mapping[str, nn.Module]:
        return {"reader": self.reader}

    def losses(self, draw: StepRNG) -> Mapping[str, Tensor]:
        rows = draw.indices(len(self.data), self.batch).numpy()
        device = next(self.reader.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, _, _ = faces_of(self.data, rows, device)
            images = augment(images, generator_for(draw.seed, draw.step, draw.rank))
        attributes = torch.from_numpy(self.data.attributes[rows].astype(np.int64)).to(device)
        scores = self.reader(images.contiguous(memory_format=torch.channels_last))
        return {"attributes": attribute_loss(scores, attributes)}

    def validate(self) -> Mapping[str, float]:
        return reader_figures(self.reader, self.held_out) if self.held_out else {}

    def sheet(self) -> Image.Image | None:
        return mistakes(self.reader, self.held_out) if self.held_out else None


@torch.no_grad()
def mistakes(
    reader: AttributeClassifier, data: WorldDataset, among: int = 256, most: int = 18
) -> Image.Image:
    """Held-out pictures, first those that are read wrong, with what is there and what was read."""
    rows = np.linspace(0, len(data) - 1, min(among, len(data))).astype(np.int64)
    images, _, _ = faces_of(data, rows, next(reader.parameters()).device)
    read = {name: scores.argmax(-1).tolist() for name, scores in reader(images).items()}
    said = []
    for row, picture in enumerate(to_pil(images)):
        wanted = dict(zip(ATTRIBUTES, data.attributes[rows[row]].tolist(), strict=True))
        wrong = [
            f"{name}: {classes[wanted[name]]}, read {classes[read[name][row]]}"
            for name, classes in ATTRIBUTES.items()
            if wanted[name] >= 0 and wanted[name] != read[name][row]
        ]
        said.append((picture, "; ".join(wrong)))
    said.sort(key=lambda pair: -len(pair[1]))
    return captioned_grid(said[:most])


def attribute_loss(scores: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """Cross-entropy, mean over the attributes; ``wanted` (B, A) in `ATTRIBUTES` order, -1: not to be seen."""
    losses = []
    for column, name in enumerate(ATTRIBUTES):
        visible = (wanted[:, column] >= 0).sum().clamp(min=1)
        losses.append(
            cross_entropy(scores[name], wanted[:, column], ignore_index=-1, reduction="sum")
            / visible
        )
    return torch.stack(losses).mean()


@torch.no_grad()
def reader_figures(
    reader: AttributeClassifier, data: WorldDataset, most: int = 1024
) -> dict[str, float]:
    """How often each attribute is read right in pictures of held-out people; `mean` and `least` of them."""
    device = next(reader.parameters()).device
    rows = np.linspace(0, len(data) - 1, min(most, len(data))).astype(np.int64)
    right = []
    for part in np.array_split(rows, max(1, len(rows) // 64)):
        images, _, _ = faces_of(data, part, device)
        right.append(
            correct(
                reader(images), torch.from_numpy(data.attributes[part].astype(np.int64)).to(device)
            )
        )
    read = accuracy(torch.cat(right))
    return {"mean": sum(read.values()) / len(read), "least": min(read.values()), **read}


def correct(scores: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """(B, A) one where the best class is the wanted one, zero where it is not, NaN where nothing can be seen."""
    best = torch.stack([scores[name].argmax(-1) for name in ATTRIBUTES], 1)
    return torch.where(wanted >= 0, (best == wanted).float(), torch.nan)


def accuracy(right: Tensor) -> dict[str, float]:
    """(N, A) from `correct` -> the share per attribute that was seen at all."""
    return {
        name: value
        for name, value in zip(ATTRIBUTES, right.nanmean(0).tolist(), strict=True)
        if value == value
    }
