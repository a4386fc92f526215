"""Training and examination of the three recognisers of the miniature's people.

A recogniser that knows people by hair and skin is worthless as a teacher: its ID loss moves hair, not faces. Hence
crops without hair, gray and recoloured pictures, a margin softmax over people of whom whole families share skin and
most of the face, and an auxiliary head that must read every facial value out of the embedding. The examination moves
one value at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize, smooth_l1_loss

from openpulid.faces.align import (
    TEMPLATE,
    align_faces,
    mask_background,
    similarity_transform,
    warp_images,
)
from openpulid.faces.mini_recognition import CROP, Recognition
from openpulid.mini.data.augment import augment, color_jitter, compose_affine, dilate, random_affine
from openpulid.training.rng import StepRNG
from openpulid.world import FACIAL, HELD_OUT_PEOPLE, PARAMETERS, PARTS, Person, Scene, render
from openpulid.world.dataset import WorldDataset

FACE = PARTS.index("face")
FACIAL_COLUMNS = [PARAMETERS.index(name) for name in FACIAL]
ENOUGH = 0.9
"""A facial value counts as seen when moving it from 0.2 to 0.8 brings the cosine to this or below."""


class MarginHead(nn.Module):
    """CosFace (Wang et al. 2018): softmax over scaled cosines to one centre per person, the right one handicapped.

    For the first `ramp` steps the centres find their people and the embedding learns nothing: random centres teach it
    only to be the same for everybody. Over as many steps more the margin grows, since a full one pushes everything apart.
    """

    def __init__(
        self, people: int, dim: int, scale: float = 32.0, margin: float = 0.35, ramp: int = 300
    ) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(people, dim))
        self.scale, self.margin, self.ramp = scale, margin, ramp

    def forward(self, embedding: Tensor, people: Tensor, step: int) -> Tensor:
        """Mean cross-entropy of (B, dim) embeddings of (B,) person indices, in a training's step (from 0)."""
        seen = embedding if step >= self.ramp else embedding.detach()
        share = min(1.0, max(0.0, step / self.ramp - 1))
        with torch.autocast(embedding.device.type, enabled=False):
            cosine = linear(normalize(seen.float()), normalize(self.centres.float()))
            handicap = self.margin * share * nn.functional.one_hot(people, len(self.centres))
            return cross_entropy(self.scale * (cosine - handicap), people)


class ValueHead(nn.Module):
    """Reads the facial values from the direction of the embedding alone; trains with it and is not shipped."""

    def __init__(self, dim: int, values: int = len(FACIAL)) -> None:
        super().__init__()
        self.read = nn.Linear(dim, values)
        # From nothing: guesses are worse than the mean, and the quickest way to the mean is an embedding that is the same for
        # everybody, which batch normalisation permits when a few pictures are far out. It does not come back from there.
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)
        self.dim = dim

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, dim) -> (B, values), about 0 to 1."""
        return self.read(normalize(embedding.float()) * math.sqrt(self.dim)).float() + 0.5


@dataclass
class RecognitionEvaluator:
    """Aligned pictures of people nobody trained on, made once and shared by the three recognisers.

    Attributes:
        crops: (N, 3, 64, 64) uint8 of many scenes; people and families (N,) say whose.
        moved_crops: (K, V, 2, 3, 64, 64) uint8: K people, each of V facial values at 0.2 and at 0.8, neutral and frontal.
    """

    crops: Tensor
    people: Tensor
    families: Tensor
    moved_crops: Tensor

    @classmethod
    def make(
        cls, held_out: WorldDataset, cache: Path, people: int = 16, device: str = "cpu"
    ) -> RecognitionEvaluator:
        """Aligns the held-out pictures and renders the moved ones; these are kept in the file `cache` (.npy)."""
        rows = range(0, len(held_out), 256)
        crops = [
            aligned_rows(held_out, np.arange(start, min(start + 256, len(held_out))))
            for start in rows
        ]
        if cache.exists():
            moved_crops = torch.from_numpy(np.load(cache))
        else:
            moved_crops = moved_pictures(people, device)
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.save(cache, moved_crops.numpy())
        person_of, family_of = (np.array(column) for column in (held_out.people, held_out.families))
        return cls(
            torch.cat(crops), torch.from_numpy(person_of), torch.from_numpy(family_of), moved_crops
        )

    @torch.no_grad()
    def figures(self, recogniser: nn.Module) -> dict[str, float]:
        """Verification and sensitivity; the targets are `auc` >= 0.985 and `seen` >= 18.

        `auc`: pictures of one person in different scenes against those of the rest of the held-out family, other people
        with the same skin and hair. `auc_anyone`: against everybody.
        `seen`: how many facial values bring the cosine to 0.9 or below when moved from 0.2 to 0.8.
        `same`, `other`: mean cosines of those pairs.
        """
        embedding = embedded(recogniser, self.crops)
        with torch.autocast("cpu", enabled=False):  # in eight bits most pairs are ties
            cosine = embedding @ embedding.T
        upper = torch.ones_like(cosine, dtype=torch.bool).triu(1)
        same = upper & (self.people[:, None] == self.people)
        other = upper & ~(self.people[:, None] == self.people)
        family = self.families[:, None] == self.families
        cosines = self.sensitivity(recogniser)
        return {
            "auc": auc(cosine[same], cosine[other & family]),
            "auc_anyone": auc(cosine[same], cosine[other]),
            "same": cosine[same].mean().item(),
            "other": cosine[other].mean().item(),
            "seen": float(sum(value <= ENOUGH for value in cosines.values())),
            "moved": sum(cosines.values()) / len(cosines),
        }

    @torch.no_grad()
    def sensitivity(self, recogniser: nn.Module) -> dict[str, float]:
        """Per facial value the cosine between 0.2 and 0.8, mean over the people."""
        embedding = embedded(recogniser, self.moved_crops.flatten(0, 2)).unflatten(
            0, self.moved_crops.shape[:3]
        )
        cosines = (embedding[:, :, 0] * embedding[:, :, 1]).sum(-1).mean(0)
        return dict(zip(FACIAL, cosines.tolist(), strict=True))


class RecognitionTask:
    """Trains one recogniser; a `training.loop.Task`.

    Args:
        recogniser: one of `faces.recognise.RECOGNITION_MODELS`, built.
        data: pictures of the training people.
        examination: pictures of held-out people; None validates nothing.
        families, pictures: a batch is this many families times this many pictures of each.
        value_weight: of the auxiliary regression, until the margin takes over; a fifth of it in the end.
        margin_weight: in the end. It begins with a tenth, since a margin over thousands of people is large in loss and gradient
            before anything is seen, and would leave nothing of the clipped gradient to the values, which teach how to see;
            from step 800 to 1600 it grows. Values alone give an embedding that is linear in them, where no single one of
            thirty can turn it far; people who differ in one feature only are told apart by the margin.
    """

    def __init__(
        self,
        recogniser: Recognition,
        data: WorldDataset,
        examination: RecognitionEvaluator | None,
        families: int = 16,
        pictures: int = 8,
        value_weight: float = 10.0,
        margin_weight: float = 1.0,
    ) -> None:
        dim = recogniser.config["dim"]
        self.recogniser = recogniser.to(memory_format=torch.channels_last)
        self.data, self.examination = data, examination
        self.people = torch.from_numpy(np.array(data.people))
        self.table = family_table(
            np.asarray(data.families)
        )  # (families, pictures) rows of the data
        self.head = MarginHead(int(self.people.max()) + 1, dim)
        self.values = ValueHead(dim)
        self.families, self.pictures = families, min(pictures, self.table.shape[1])
        self.value_weight, self.margin_weight = value_weight, margin_weight

    def modules(self) -> Mapping[str, nn.Module]:
        return {"recogniser": self.recogniser, "head": self.head, "values": self.values}

    def losses(self, draw: StepRNG) -> Mapping[str, Tensor]:
        families = draw.indices(len(self.table), self.families, "families")
        columns = draw.rand((len(families), self.table.shape[1]), "columns").argsort(1)[
            :, : self.pictures
        ]
        rows = torch.gather(self.table[families], 1, columns).flatten()
        crops = self.crops(rows.numpy(), draw.generator("damage"))
        embedding = self.recogniser(crops.contiguous(memory_format=torch.channels_last))
        people = self.people[rows].to(crops.device)
        values = torch.from_numpy(self.data.vectors[rows.numpy()][:, FACIAL_COLUMNS]).to(
            crops.device
        )
        late = min(1.0, max(0.0, draw.step / 800 - 1))
        return {
            "margin": (0.1 + 0.9 * late)
            * self.margin_weight
            * self.head(embedding, people, draw.step),
            "values": (1.0 - 0.8 * late)
            * self.value_weight
            * smooth_l1_loss(self.values(embedding), values, beta=0.1),
        }

    def crops(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """(B, 3, 64, 64) damaged training crops of some rows of the data, on the recogniser's device."""
        device = next(self.recogniser.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, masks, landmarks = faces_of(self.data, rows, device)
            width = masks.amax((1, 2)).sum(-1)  # of the face, in pixels
            error = 0.012 * torch.randn(landmarks.shape, generator=generator).to(device)
            matrix = similarity_transform(landmarks + error * width[:, None, None], TEMPLATE * CROP)
            jitter = random_affine(len(rows), CROP, generator, turn=0.08, grow=0.06, shift=0.02)
            crops = warp_images(torch.cat([images, masks], 1), compose_affine(matrix, jitter), CROP)
            faces = augment(color_jitter(crops[:, :3], generator), generator)
            return mask_background(faces, dilate(crops[:, 3:], generator))

    def validate(self) -> Mapping[str, float]:
        return self.examination.figures(self.recogniser) if self.examination else {}

    def sheet(self) -> Image.Image | None:
        """What the recogniser learns from: two families, damaged as in training."""
        crops = self.crops(
            self.table[:2, :12].flatten().numpy(), torch.Generator().manual_seed(0)
        ).cpu()
        picture = crops.unflatten(0, (2, -1)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        return Image.fromarray((picture * 255).round().to(torch.uint8).numpy())


@torch.no_grad()
def whitened(task: RecognitionTask, most: int = 8192, levelled: float = 0.3, seed: int = 0) -> None:
    """Two changes of coordinates, folded into the recogniser's last layer, in place.

    What differs between pictures of one person is noise; measured in its units (within-class covariance normalisation,
    Hatch et al. 2006), a feature that is small but sure weighs as much as a large one. Then the directions in which people
    differ are brought nearer to one another, variances to the power 1 - 2 * `levelled`: without it the shape of the face
    drowns brows and eyes in the cosine, with all of it (0.5) noise is as loud as they are.
    """
    recogniser, generator = task.recogniser.eval(), torch.Generator().manual_seed(seed)
    rows = np.linspace(0, len(task.data) - 1, min(most, len(task.data))).astype(np.int64)
    rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
    parts = np.array_split(rows, max(1, len(rows) // 256))
    embedding = torch.cat(
        [recogniser(task.crops(part, generator)).cpu() for part in parts]
    ).double()
    people, place = task.people[rows].unique(return_inverse=True)
    counts = torch.bincount(place).double()
    means = (
        embedding.new_zeros(len(people), embedding.shape[1]).index_add_(0, place, embedding)
        / counts[:, None]
    )
    apart = embedding - means[place]
    within = apart.T @ apart / (counts - 1).sum().clamp(min=1)
    sphered = _power(within, -0.5, 0.02)
    between = sphered @ (torch.cov(embedding.T) - within) @ sphered
    _folded(recogniser.head, _power(between, -levelled, 1.0) @ sphered)


def _power(covariance: Tensor, exponent: float, shrinkage: float) -> Tensor:
    """A symmetric matrix to a power, after `shrinkage` times its mean variance is added to every direction."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    values = values + shrinkage * values.mean() + torch.finfo(values.dtype).tiny
    return vectors @ torch.diag(values**exponent) @ vectors.T


def _folded(head: nn.Sequential, matrix: Tensor) -> None:
    """`matrix` (dim, dim) after a head of a linear layer and a normalisation without weights, made part of both."""
    linear_, norm = cast(nn.Linear, head[-2]), cast(nn.BatchNorm1d, head[-1])
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    change = matrix.to(linear_.weight) / (variance + norm.eps).sqrt()
    linear_.weight.copy_(change @ linear_.weight)
    mean.copy_(change @ mean)
    variance.fill_(1 - norm.eps)


def family_table(families: np.ndarray) -> Tensor:
    """(families, pictures) int64 rows of each family's pictures; smaller families repeat theirs."""
    order = np.argsort(families, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(families[order])) + 1)
    longest = max(len(group) for group in groups)
    return torch.from_numpy(np.stack([np.resize(group, longest) for group in groups]))


def faces_of(
    data: WorldDataset, rows: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, S, S) and face masks (B, 1, S, S) float in [0, 1], and landmarks (B, 5, 2), of some rows."""
    images = torch.from_numpy(data.images[rows]).to(device).float() / 255
    masks = (torch.from_numpy(data.parts[rows]).to(device)[:, None] == FACE).float()
    return images, masks, torch.from_numpy(data.landmarks[rows]).to(device)


def aligned_rows(data: WorldDataset, rows: np.ndarray) -> Tensor:
    """(B, 3, 64, 64) uint8 crops from the exact masks and landmarks."""
    return (
        (align_faces(*faces_of(data, rows, torch.device("cpu")), CROP) * 255)
        .round()
        .to(torch.uint8)
    )


@torch.no_grad()
def moved_pictures(people: int, device: str = "cpu") -> Tensor:
    """(people, FACIAL, 2, 3, 64, 64) uint8 crops: each facial value of each held-out person at 0.2 and at 0.8."""
    crops = []
    for seed in range(HELD_OUT_PEOPLE, HELD_OUT_PEOPLE + people):
        person = Person.from_seed(seed)
        variants = [person.replace(**{name: value}) for name in FACIAL for value in (0.2, 0.8)]
        made = render(variants, [Scene()] * len(variants), size=96, device=device)
        crops.append(
            (align_faces(made.image, made.face, made.landmarks, CROP) * 255)
            .round()
            .to(torch.uint8)
            .cpu()
        )
    return torch.stack(crops).unflatten(1, (len(FACIAL), 2))


@torch.no_grad()
def embedded(recogniser: nn.Module, crops: Tensor) -> Tensor:
    """(N, dim) normalised embeddings of (N, 3, 64, 64) uint8 crops, on the CPU."""
    device = next(recogniser.parameters()).device
    parts = [recogniser(part.to(device).float() / 255).float().cpu() for part in crops.split(256)]
    with torch.autocast("cpu", enabled=False):
        return normalize(torch.cat(parts))


def auc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive score is above a negative one (area under the ROC curve); ties count half."""
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = negative.float().sort().values.contiguous()
    below = torch.searchsorted(ordered, positive.float().contiguous())
    up_to = torch.searchsorted(ordered, positive.float().contiguous(), right=True)
    return ((below + up_to).double().mean() / (2 * len(ordered))).item()


def report(recognisers: Mapping[str, nn.Module], examination: RecognitionEvaluator) -> str:
    """Markdown: the figures of each recogniser, then the cosine after moving each facial value from 0.2 to 0.8."""
    figures = {name: examination.figures(network) for name, network in recognisers.items()}
    cosines = {name: examination.sensitivity(network) for name, network in recognisers.items()}
    head = f"| | {' | '.join(recognisers)} |\n|---{'|---' * len(recognisers)}|\n"
    rows = [
        (key, [figures[name][key] for name in recognisers]) for key in next(iter(figures.values()))
    ]
    moves = [(value, [cosines[name][value] for name in recognisers]) for value in FACIAL]
    return "\n".join(
        head + "".join(_row(key, values) for key, values in part) for part in (rows, moves)
    )


def _row(key: str, values: list[float]) -> str:
    return f"| {key} | {' | '.join(f'{value:.3f}' for value in values)} |\n"
