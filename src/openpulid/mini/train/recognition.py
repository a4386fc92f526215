"""Training and evaluation of the miniature's three face recognition models.

A model that recognizes people by hair and skin is useless as a teacher: its ID loss would change
the hair, not the face. Therefore crops exclude hair, some images are gray or recolored, a margin
softmax separates people of families that share skin and most of the face, and an auxiliary head
must predict every facial value from the embedding. The evaluation changes one value at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize, one_hot, smooth_l1_loss

from openpulid.faces.align import GRAY, align_faces, crop_faces, replace_background
from openpulid.faces.augment import color_jitter, degrade, dilate, random_affine
from openpulid.faces.miniature import CROP, Recognition
from openpulid.mini.data import load_faces
from openpulid.training import StepRNG
from openpulid.world import (
    FACIAL,
    HELD_OUT_PEOPLE,
    PARAMETERS,
    Person,
    Scene,
    WorldDataset,
    render,
)

FACIAL_COLUMNS = [PARAMETERS.index(name) for name in FACIAL]
SMALL_FEATURES = ("iris_hue", "iris_lightness", "age_lines", "freckles", "mole")
"""Facial values that change a few pixels only."""
MAX_COSINE_AFTER_CHANGE = 0.9
"""A model is sensitive to a facial value if a change from 0.2 to 0.8 lowers the cosine to this."""


class MarginHead(nn.Module):
    """CosFace (Wang et al. 2018): softmax over scaled cosines to one center per person.

    The margin is subtracted from the cosine to the correct center. For the first `ramp` steps only
    the centers are trained: random centers would only teach the embedding to be the same for
    everyone. Over the next `ramp` steps the margin grows, since the full margin at this point
    pushes everything apart.
    """

    def __init__(
        self, people: int, dim: int, scale: float = 32.0, margin: float = 0.35, ramp: int = 300
    ) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(people, dim))
        self.scale = scale
        self.margin = margin
        self.ramp = ramp

    def forward(self, embedding: Tensor, people: Tensor, step: int) -> Tensor:
        """Compute the mean cross-entropy.

        Args:
            embedding: (B, dim) raw embeddings.
            people: (B,) indices of the people.
            step: training step, from 0.
        """
        if step < self.ramp:
            embedding = embedding.detach()
        share = min(1.0, max(0.0, step / self.ramp - 1))
        with torch.autocast(embedding.device.type, enabled=False):
            cosine = linear(normalize(embedding.float()), normalize(self.centers.float()))
            margin = self.margin * share * one_hot(people, len(self.centers))
            return cross_entropy(self.scale * (cosine - margin), people)


class ValueHead(nn.Module):
    """Predicts the facial values from the direction of the embedding.

    It is trained together with the network and is not shipped.
    """

    def __init__(self, dim: int, values: int = len(FACIAL)) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, values)
        # The initial prediction is the mean. Random predictions are worse than the mean, and the
        # quickest way to the mean is a constant embedding, which batch normalization permits if a
        # few images are outliers. Training does not recover from that.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.dim = dim

    def forward(self, embedding: Tensor) -> Tensor:
        """Predict the values (B, values), about 0 to 1, from embeddings (B, dim)."""
        return self.linear(normalize(embedding.float()) * math.sqrt(self.dim)).float() + 0.5


@dataclass
class RecognitionEvaluator:
    """Evaluates recognition models on aligned images of held-out people.

    The images are prepared once and shared by the three models.

    Attributes:
        crops: (N, 3, 64, 64) uint8 in various scenes.
        people: (N,) indices of the people.
        families: (N,) indices of their families.
        changed_crops: (K, V, 2, 3, 64, 64) uint8 of K people with each of V facial values at 0.2
            and at 0.8, neutral and frontal.
    """

    crops: Tensor
    people: Tensor
    families: Tensor
    changed_crops: Tensor

    @classmethod
    def build(
        cls, held_out: WorldDataset, people: int = 16, device: str = "cpu"
    ) -> RecognitionEvaluator:
        """Align the held-out images and render people with changed values.

        Args:
            held_out: images of held-out people.
            people: number of people to render.
            device: where to render.
        """
        starts = range(0, len(held_out), 256)
        crops = [
            load_aligned_crops(held_out, np.arange(start, min(start + 256, len(held_out))))
            for start in starts
        ]
        return cls(
            torch.cat(crops),
            torch.from_numpy(np.array(held_out.people)),
            torch.from_numpy(np.array(held_out.families)),
            render_value_changes(people, device),
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure verification and sensitivity.

        Returns:
            `auc` of images of one person in different scenes against other people of the same
            family, who share skin and hair (target: at least 0.985). `auc_anyone` against all
            other people. `same` and `other`, the mean cosines of these pairs. `seen`, the number of
            facial values that lower the cosine to 0.9 or less when changed from 0.2 to 0.8 (target:
            at least 18). `moved`, the mean cosine after such a change.
        """
        embedding = embed_crops(model, self.crops)
        # Autocast would round the cosines to eight bits, and most pairs would be ties.
        with torch.autocast("cpu", enabled=False):
            cosine = embedding @ embedding.T
        upper = torch.ones_like(cosine, dtype=torch.bool).triu(1)
        same_person = self.people[:, None] == self.people
        same_family = self.families[:, None] == self.families
        same = upper & same_person
        different = upper & ~same_person
        cosines = self.sensitivity(model)
        return {
            "auc": compute_auc(cosine[same], cosine[different & same_family]),
            "auc_anyone": compute_auc(cosine[same], cosine[different]),
            "same": cosine[same].mean().item(),
            "other": cosine[different].mean().item(),
            "seen": float(sum(value <= MAX_COSINE_AFTER_CHANGE for value in cosines.values())),
            "moved": sum(cosines.values()) / len(cosines),
        }

    @torch.no_grad()
    def sensitivity(self, model: nn.Module) -> dict[str, float]:
        """Measure the cosine between each facial value at 0.2 and at 0.8, averaged over people."""
        embedding = embed_crops(model, self.changed_crops.flatten(0, 2))
        embedding = embedding.unflatten(0, self.changed_crops.shape[:3])
        cosines = (embedding[:, :, 0] * embedding[:, :, 1]).sum(-1).mean(0)
        return dict(zip(FACIAL, cosines.tolist(), strict=True))


class RecognitionTask:
    """Trains one recognition model; a `training.trainer.Task`.

    Args:
        model: instance of one of `faces.miniature.RECOGNITION_MODELS`.
        data: images of the training people.
        evaluator: images of held-out people; None disables validation.
        families: families per batch.
        images_per_family: images of each family per batch.
        value_weight: initial weight of the auxiliary regression; its final weight is a fifth.
        margin_weight: final weight of the margin loss. It starts at a tenth and grows from step 800
            to 1600. A margin over thousands of people has a large loss and gradient before the
            embedding is useful, and the clipped gradient would contain almost nothing of the
            regression, which teaches the features. The regression alone gives an embedding that is
            linear in the values, where no single one of thirty changes the direction much; the
            margin separates people who differ in one feature only.
        details: whether the regression weights `SMALL_FEATURES` three times as much, with fewer
            gray and less recolored images. With 30% of gray images a model explained 6% of the
            variance of the iris hue (benchmarks/mini-build.md).
    """

    def __init__(
        self,
        model: Recognition,
        data: WorldDataset,
        evaluator: RecognitionEvaluator | None,
        families: int = 16,
        images_per_family: int = 8,
        value_weight: float = 10.0,
        margin_weight: float = 1.0,
        details: bool = False,
    ) -> None:
        dim = model.config["dim"]
        self.model = model.to(memory_format=torch.channels_last)
        self.data = data
        self.evaluator = evaluator
        self.people = torch.from_numpy(np.array(data.people))
        self.family_rows = build_family_table(np.asarray(data.families))
        self.head = MarginHead(int(self.people.max()) + 1, dim)
        self.values = ValueHead(dim)
        self.families = families
        self.images_per_family = min(images_per_family, self.family_rows.shape[1])
        self.value_weight = value_weight
        self.margin_weight = margin_weight
        self.details = details
        is_small = torch.tensor([name in SMALL_FEATURES for name in FACIAL])
        self.feature_weights = torch.where(is_small & details, 3.0, 1.0)

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the recognition model and its two training heads."""
        return {"recognition": self.model, "head": self.head, "values": self.values}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the margin loss and the auxiliary regression on images of some families."""
        families = rng.indices(len(self.family_rows), self.families, "families")
        order = rng.rand((len(families), self.family_rows.shape[1]), "columns").argsort(1)
        columns = order[:, : self.images_per_family]
        rows = torch.gather(self.family_rows[families], 1, columns).flatten()
        crops = self.sample_crops(rows.numpy(), rng.generator("damage"))
        embedding = self.model(crops.contiguous(memory_format=torch.channels_last))
        people = self.people[rows].to(crops.device)
        values = torch.from_numpy(self.data.vectors[rows.numpy()][:, FACIAL_COLUMNS])
        values = values.to(crops.device)
        margin_share = min(1.0, max(0.0, rng.step / 800 - 1))
        margin_weight = (0.1 + 0.9 * margin_share) * self.margin_weight
        value_weight = (1.0 - 0.8 * margin_share) * self.value_weight
        errors = smooth_l1_loss(self.values(embedding), values, beta=0.1, reduction="none")
        return {
            "margin": margin_weight * self.head(embedding, people, rng.step),
            "values": value_weight * (errors * self.feature_weights.to(errors.device)).mean(),
        }

    def sample_crops(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """Crop and degrade training images.

        Args:
            rows: (B,) rows of the data.
            generator: source of all random numbers.

        Returns:
            (B, 3, 64, 64) in [0, 1], on the model's device.
        """
        device = next(self.model.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, masks, landmarks = load_faces(self.data, rows, device)
            width = masks.amax((1, 2)).sum(-1)  # of the face, in pixels
            error = 0.012 * torch.randn(landmarks.shape, generator=generator).to(device)
            points = landmarks + error * width[:, None, None]
            jitter = random_affine(len(rows), CROP, generator, turn=0.08, grow=0.06, shift=0.02)
            crops, crop_masks = crop_faces(images, masks, points, CROP, jitter)
            strength, gray = (0.6, 0.1) if self.details else (1.0, 0.3)
            faces = degrade(color_jitter(crops, generator, strength, gray), generator)
            return replace_background(faces, dilate(crop_masks, generator), GRAY)

    def validate(self) -> Mapping[str, float]:
        """Measure verification and sensitivity on held-out people."""
        return self.evaluator.evaluate(self.model) if self.evaluator else {}

    def sheet(self) -> Image.Image | None:
        """Draw training crops of two families, degraded as in training."""
        rows = self.family_rows[:2, :12].flatten().numpy()
        crops = self.sample_crops(rows, torch.Generator().manual_seed(0)).cpu()
        grid = crops.unflatten(0, (2, -1)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        return Image.fromarray((grid * 255).round().to(torch.uint8).numpy())


@torch.no_grad()
def whiten_embeddings(
    task: RecognitionTask, limit: int = 8192, equalization: float = 0.3, seed: int = 0
) -> None:
    """Whiten the embeddings by a linear map that is folded into the model's last layer, in place.

    The map has two steps. The first is within-class covariance normalization (Hatch et al. 2006):
    differences between images of one person are noise, and in units of this noise a small but
    reliable feature weighs as much as a large one. The second equalizes the directions in which
    people differ: variances are raised to the power 1 - 2 * `equalization`. At 0 the shape of the
    face dominates brows and eyes in the cosine; at 0.5 noise weighs as much as they do.

    Args:
        task: the finished training; its images and crops are used.
        limit: maximum number of images to measure on.
        equalization: strength of the second step, from 0 to 0.5.
        seed: of the degradation and the order of the images.
    """
    model = task.model.eval()
    generator = torch.Generator().manual_seed(seed)
    rows = np.linspace(0, len(task.data) - 1, min(limit, len(task.data))).astype(np.int64)
    rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
    chunks = np.array_split(rows, max(1, len(rows) // 256))
    embedding = torch.cat(
        [model(task.sample_crops(chunk, generator)).cpu() for chunk in chunks]
    ).double()
    people, person_index = task.people[rows].unique(return_inverse=True)
    counts = torch.bincount(person_index).double()
    sums = embedding.new_zeros(len(people), embedding.shape[1])
    means = sums.index_add_(0, person_index, embedding) / counts[:, None]
    deviation = embedding - means[person_index]
    within = deviation.T @ deviation / (counts - 1).sum().clamp(min=1)
    normalization = _matrix_power(within, -0.5, 0.02)
    between = normalization @ (torch.cov(embedding.T) - within) @ normalization
    matrix = _matrix_power(between, -equalization, 1.0) @ normalization
    _fold_into_head(model.head, matrix)


def _matrix_power(covariance: Tensor, exponent: float, shrinkage: float) -> Tensor:
    """Raise a symmetric matrix to a power.

    `shrinkage` times the mean variance is added to each direction first.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    values = values + shrinkage * values.mean() + torch.finfo(values.dtype).tiny
    return vectors @ torch.diag(values**exponent) @ vectors.T


def _fold_into_head(head: nn.Sequential, matrix: Tensor) -> None:
    """Apply a matrix (dim, dim) to the output of a head by changing its last two layers.

    These are a linear layer and a batch normalization without weights.
    """
    projection = cast(nn.Linear, head[-2])
    norm = cast(nn.BatchNorm1d, head[-1])
    mean = cast(Tensor, norm.running_mean)
    variance = cast(Tensor, norm.running_var)
    change = matrix.to(projection.weight) / (variance + norm.eps).sqrt()
    projection.weight.copy_(change @ projection.weight)
    mean.copy_(change @ mean)
    variance.fill_(1 - norm.eps)


def build_family_table(families: np.ndarray) -> Tensor:
    """Group rows by family.

    Args:
        families: (N,) family of each row.

    Returns:
        (families, images) int64 rows of each family; those of smaller families are repeated.
    """
    order = np.argsort(families, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(families[order])) + 1)
    longest = max(len(group) for group in groups)
    return torch.from_numpy(np.stack([np.resize(group, longest) for group in groups]))


def load_aligned_crops(data: WorldDataset, rows: np.ndarray) -> Tensor:
    """Load crops (B, 3, 64, 64) uint8, aligned by the exact masks and landmarks."""
    images, masks, landmarks = load_faces(data, rows, torch.device("cpu"))
    return to_uint8(align_faces(images, masks, landmarks, CROP))


@torch.no_grad()
def render_value_changes(people: int, device: str = "cpu") -> Tensor:
    """Render held-out people with each facial value at 0.2 and at 0.8.

    Args:
        people: number of people.
        device: where to render.

    Returns:
        (people, len(FACIAL), 2, 3, 64, 64) uint8 crops on the CPU.
    """
    crops = []
    for seed in range(HELD_OUT_PEOPLE, HELD_OUT_PEOPLE + people):
        person = Person.from_seed(seed)
        variants = [person.replace(**{name: value}) for name in FACIAL for value in (0.2, 0.8)]
        rendered = render(variants, [Scene()] * len(variants), size=96, device=device)
        aligned = align_faces(rendered.image, rendered.face, rendered.landmarks, CROP)
        crops.append(to_uint8(aligned).cpu())
    return torch.stack(crops).unflatten(1, (len(FACIAL), 2))


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [0, 1] to uint8."""
    return (images * 255).round().to(torch.uint8)


@torch.no_grad()
def embed_crops(model: nn.Module, crops: Tensor) -> Tensor:
    """Compute the normalized embeddings of aligned crops in batches.

    Args:
        model: a recognition model.
        crops: (N, 3, 64, 64) uint8.

    Returns:
        (N, dim) float32 on the CPU.
    """
    device = next(model.parameters()).device
    chunks = [model(chunk.to(device).float() / 255).float().cpu() for chunk in crops.split(256)]
    with torch.autocast("cpu", enabled=False):
        return normalize(torch.cat(chunks))


def compute_auc(positive: Tensor, negative: Tensor) -> float:
    """Compute the area under the ROC curve.

    It is the probability that a positive score exceeds a negative one; ties count half. NaN if
    there are no scores of one kind.
    """
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = negative.float().sort().values.contiguous()
    below = torch.searchsorted(ordered, positive.float().contiguous())
    up_to = torch.searchsorted(ordered, positive.float().contiguous(), right=True)
    return ((below + up_to).double().mean() / (2 * len(ordered))).item()


def format_report(models: Mapping[str, nn.Module], evaluator: RecognitionEvaluator) -> str:
    """Evaluate models and format the results as Markdown.

    Args:
        models: recognition models by column title.
        evaluator: images to evaluate them on.

    Returns:
        A table of the metrics, then the cosine after the change of each facial value.
    """
    metrics = {name: evaluator.evaluate(model) for name, model in models.items()}
    cosines = {name: evaluator.sensitivity(model) for name, model in models.items()}
    return _format_table(metrics) + "\n" + _format_table(cosines)


def _format_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Format columns, each a mapping from the row's title to a value, as a Markdown table."""
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for key in next(iter(columns.values())):
        values = " | ".join(f"{column[key]:.3f}" for column in columns.values())
        lines.append(f"| {key} | {values} |")
    return "\n".join(lines) + "\n"
