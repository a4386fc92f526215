"""Training and examination of the face finder: to see the miniature's people in any picture, and nobody else.

World pictures are moved, recoloured and damaged so that generated ones, which are softer, are found too. Everything
else is refused: see `mini.negatives`. Both kinds pass through the same damage, or the damage would tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, grid_sample

from openpulid.faces.align import warp_images
from openpulid.faces.mini_detector import FACE, PARTS, SIZE, MiniDetection, MiniFaceDetector
from openpulid.mini.data import negatives as made
from openpulid.mini.data.augment import augment, color_jitter, random_affine
from openpulid.training.rng import StepRNG, generator_for
from openpulid.world.dataset import WorldDataset

UNLABELLED = -100
"""Pixels whose part is not judged (`cross_entropy`'s ignore_index)."""


@dataclass(frozen=True)
class Examples:
    """A batch: images (B, 3, 96, 96), real (B,) bool, landmarks (B, 5, 2), parts (B, 96, 96) int64 or `UNLABELLED`."""

    images: Tensor
    real: Tensor
    landmarks: Tensor
    parts: Tensor


class DetectorTask:
    """Trains a `MiniFaceDetector`; a `training.loop.Task`.

    Args:
        finder: the network.
        data, held_out: pictures to learn from and to be examined on.
        positives, negatives: how many pictures of each kind a batch has.
        photos: `negatives.photographs()`, or a few of one's own.
    """

    def __init__(
        self,
        finder: MiniFaceDetector,
        data: WorldDataset,
        held_out: WorldDataset | None,
        photos: Mapping[str, Tensor],
        positives: int = 40,
        negatives: int = 24,
    ) -> None:
        self.finder = finder.to(memory_format=torch.channels_last)
        self.data, self.held_out = data, held_out
        self.photos = {name: image for name, image in photos.items() if name not in made.HELD_OUT}
        self.strange = {name: image for name, image in photos.items() if name in made.HELD_OUT}
        self.positives, self.negatives = positives, negatives

    def modules(self) -> Mapping[str, nn.Module]:
        return {"finder": self.finder}

    def losses(self, draw: StepRNG) -> Mapping[str, Tensor]:
        rows = draw.indices(len(self.data), self.positives).numpy()
        draw.samples = self.positives + self.negatives
        batch = self.examples(
            rows, self.negatives // draw.world, generator_for(draw.seed, draw.step, draw.rank)
        )
        finding = self.finder(batch.images.contiguous(memory_format=torch.channels_last))
        return finder_losses(finding, batch)

    @torch.no_grad()
    def examples(self, rows: np.ndarray, others: int, generator: torch.Generator) -> Examples:
        """World pictures `rows` and `others` that are none, all moved and damaged, on the finder's device."""
        device = next(self.finder.parameters()).device
        with torch.autocast(device.type, enabled=False):
            images = torch.from_numpy(self.data.images[rows]).float() / 255
            parts = torch.from_numpy(self.data.parts[rows]).float()
            landmarks = torch.from_numpy(self.data.landmarks[rows])
            strange, labels = strangers(images, parts, self.photos, others, generator)
            real = torch.arange(len(rows) + others) < len(rows)
            images, parts = torch.cat([images, strange]), torch.cat([parts, labels])
            landmarks = torch.cat([landmarks, torch.full((others, 5, 2), SIZE / 2)])
            order = torch.randperm(len(real), generator=generator)
            batch = Examples(
                *(tensor[order].to(device) for tensor in (images, real, landmarks, parts))
            )
            batch = mirrored(displaced(batch, generator), generator)
            images = augment(color_jitter(batch.images, generator, gray=0.2), generator)
            return Examples(images, batch.real, batch.landmarks, batch.parts.long())

    def validate(self) -> Mapping[str, float]:
        """Figures on held-out people, and on strangers.

        `landmarks`: mean distance as a share of the face's width (target 0.03). `iou` of the face mask (0.9). `found`:
        how many of the people. `refused`: how many photographs never trained on, noises, colours and emptied pictures.
        """
        if self.held_out is None:
            return {}
        return {
            **detector_figures(self.finder, self.held_out),
            "refused": self.refused(self.held_out),
        }

    def refused(self, data: WorldDataset, count: int = 128) -> float:
        """The share of strangers that is refused; some of them are made from pictures of `data`."""
        generator = generator_for("strangers")
        rows = np.linspace(0, len(data) - 1, count).astype(int)
        images = torch.from_numpy(data.images[rows]).float() / 255
        parts = torch.from_numpy(data.parts[rows]).float()
        images, _ = strangers(images, parts, self.strange or self.photos, count, generator)
        return float(np.mean([face is None for face in self.finder.detect(images)]))

    def sheet(self) -> Image.Image | None:
        """Training pictures with what the finder says: points green, red where it sees no face; the mask brighter."""
        rows = np.linspace(0, len(self.data) - 1, 20).astype(int)
        batch = self.examples(rows, 20, generator_for("sheet"))
        finding = self.finder(batch.images)
        images = (batch.images * (0.6 + 0.4 * finding.face)).cpu()
        for image, points, score in zip(
            images, finding.landmarks.cpu(), finding.score_logit.cpu(), strict=True
        ):
            color = torch.tensor([0.0, 1.0, 0.0] if score > 0 else [1.0, 0.0, 0.0])
            for x, y in points.clamp(1, SIZE - 2).long().tolist():
                image[:, y - 1 : y + 1, x - 1 : x + 1] = color[:, None, None]
        picture = images.unflatten(0, (-1, 10)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        return Image.fromarray((picture * 255).round().to(torch.uint8).numpy())


def finder_losses(finding: MiniDetection, batch: Examples) -> dict[str, Tensor]:
    """Score, landmarks (pixels, of the real ones) and parts; the face counts four times as much as the rest."""
    real = batch.real.float()
    distance = (finding.landmarks - batch.landmarks).abs().mean((1, 2))
    weight = torch.ones(PARTS, device=finding.parts.device)
    weight[FACE] = 4.0
    return {
        "score": binary_cross_entropy_with_logits(finding.score_logit, real),
        "landmarks": 0.2 * (distance * real).sum() / real.sum().clamp(min=1),
        "parts": cross_entropy(finding.parts, batch.parts, weight, ignore_index=UNLABELLED),
    }


def strangers(
    images: Tensor,
    parts: Tensor,
    photos: Mapping[str, Tensor],
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(count, 3, 96, 96) pictures without a face of this world, and their parts (count, 96, 96) float.

    A third are photographs, a third come from the world pictures (B, 3, 96, 96) and parts given, a third from
    nothing. What still holds hair and clothes has no labels.
    """
    third = count // 3
    taken = torch.randperm(len(images), generator=generator)[:third]
    kinds = [made.shuffle_tiles, made.remove_person, made.erase_face, made.erase_face]
    if photos:
        kinds.append(partial(made.paste_real_faces, photos=photos))
    found, labels = [], []
    for kind, part in zip(kinds, taken.tensor_split(len(kinds)), strict=True):
        if len(part):
            found.append(kind(images[part], parts[part], generator=generator))
            known = kind is made.remove_person
            labels.append(torch.full((len(part), SIZE, SIZE), 0.0 if known else float(UNLABELLED)))
    singles = [made.crop_photograph(photos, SIZE, generator) for _ in range(third if photos else 0)]
    makers = (made.sample_noise, made.sample_shapes, made.sample_gradient, made.sample_shapes)
    while len(singles) < count - len(taken):
        singles.append(makers[len(singles) % len(makers)](SIZE, generator))
    labels.append(torch.zeros(len(singles), SIZE, SIZE))
    return torch.cat([*found, torch.stack(singles)]), torch.cat(labels)


def displaced(batch: Examples, generator: torch.Generator) -> Examples:
    """Everything turned, scaled and shifted; what comes into view around a picture has one colour: background."""
    device = batch.images.device
    matrix = random_affine(len(batch.images), SIZE, generator, turn=0.2, grow=0.25, shift=0.08).to(
        device
    )
    color = torch.rand(len(matrix), 3, 1, 1, generator=generator)
    color[::2] = 0.5  # the bars that `find` adds
    inside = torch.ones_like(batch.images[:, :1])
    warped = warp_images(torch.cat([batch.images, inside], 1), matrix[:, :2], SIZE)
    images = warped[:, :3] + (1 - warped[:, 3:]) * color.to(device)
    axis = torch.arange(SIZE, device=device) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    homogeneous = torch.stack([x, y, torch.ones_like(x)], -1)
    points = (homogeneous[None, :, :, None] * matrix[:, None, None, :2]).sum(-1)
    parts = grid_sample(
        batch.parts[:, None], 2 * points / SIZE - 1, mode="nearest", align_corners=False
    )[:, 0]
    offset = batch.landmarks - matrix[:, None, :2, 2]
    inverse = torch.linalg.inv(matrix[:, :2, :2])
    landmarks = (offset[:, :, None] * inverse[:, None]).sum(-1)
    return Examples(images, batch.real, landmarks, parts)


def mirrored(batch: Examples, generator: torch.Generator) -> Examples:
    """Every second picture reversed; left stays what has the smaller x."""
    flip = (torch.rand(len(batch.images), generator=generator) < 0.5).to(batch.images.device)
    images = torch.where(flip[:, None, None, None], batch.images.flip(-1), batch.images)
    parts = torch.where(flip[:, None, None], batch.parts.flip(-1), batch.parts)
    swapped = batch.landmarks[:, [1, 0, 2, 4, 3]]
    swapped = torch.stack([SIZE - swapped[..., 0], swapped[..., 1]], -1)
    return Examples(
        images, batch.real, torch.where(flip[:, None, None], swapped, batch.landmarks), parts
    )


@torch.no_grad()
def detector_figures(
    finder: MiniFaceDetector, data: WorldDataset, limit: int = 1024
) -> dict[str, float]:
    """Landmark error, IoU and how many are found, over up to `limit` undamaged pictures spread over the data."""
    device = next(finder.parameters()).device
    rows = np.unique(np.linspace(0, len(data) - 1, min(limit, len(data))).astype(int))
    errors, ious, scores = [], [], []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        finding = finder(torch.from_numpy(data.images[part]).to(device).float() / 255)
        mask = torch.from_numpy(data.parts[part]).to(device)[:, None] == FACE
        width = mask.any(2).float().sum((1, 2)).clamp(min=1)
        points = torch.from_numpy(data.landmarks[part]).to(device)
        errors.append((finding.landmarks - points).norm(dim=-1).mean(1) / width)
        said = finding.face > 0
        ious.append((said & mask).sum((1, 2, 3)) / (said | mask).sum((1, 2, 3)).clamp(min=1))
        scores.append(finding.score_logit)
    error, iou, score = torch.cat(errors), torch.cat(ious), torch.cat(scores)
    return {
        "landmarks": error.mean().item(),
        "landmarks_p95": error.float().quantile(0.95).item(),
        "iou": iou.mean().item(),
        "found": (score > 0).float().mean().item(),
    }
