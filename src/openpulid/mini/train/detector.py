"""Training and evaluation of the miniature's face detector.

The detector finds the people of the synthetic world and rejects every other image. World images are
transformed, recolored and degraded, so that generated images, which are softer, are detected as
well. The negatives come from `mini.data.negatives`. Both kinds get the same degradation, since the
detector could otherwise tell them apart by it.
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
from openpulid.faces.augment import color_jitter, degrade, random_affine
from openpulid.faces.miniature import FACE, PARTS, SIZE, MiniDetection, MiniFaceDetector
from openpulid.mini.data import negatives as negative_images
from openpulid.training import StepRNG, generator_for
from openpulid.world import WorldDataset

UNLABELED = -100
"""Label of pixels that the parts loss ignores (`cross_entropy`'s ignore_index)."""


@dataclass(frozen=True)
class DetectorBatch:
    """A batch of positive and negative images with their labels.

    Attributes:
        images: (B, 3, 96, 96) in [0, 1].
        real: (B,) bool, true for people of the world.
        landmarks: (B, 5, 2) in pixels; meaningless for negatives.
        parts: (B, 96, 96) part indices or `UNLABELED`, int64 (float until they are transformed).
    """

    images: Tensor
    real: Tensor
    landmarks: Tensor
    parts: Tensor


class DetectorTask:
    """Trains a `MiniFaceDetector`; a `training.trainer.Task`.

    Args:
        detector: the network.
        data: training images.
        held_out: evaluation images; None disables validation.
        photos: photographs by name, such as `negatives.load_photographs()`.
        positives: images with a person per batch.
        negatives: images without a person per batch.
    """

    def __init__(
        self,
        detector: MiniFaceDetector,
        data: WorldDataset,
        held_out: WorldDataset | None,
        photos: Mapping[str, Tensor],
        positives: int = 40,
        negatives: int = 24,
    ) -> None:
        self.detector = detector.to(memory_format=torch.channels_last)
        self.data = data
        self.held_out = held_out
        self.photos = {
            name: image for name, image in photos.items() if name not in negative_images.HELD_OUT
        }
        self.held_out_photos = {
            name: image for name, image in photos.items() if name in negative_images.HELD_OUT
        }
        self.positives = positives
        self.negatives = negatives

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the detector."""
        return {"detector": self.detector}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the losses of a new batch."""
        rows = rng.indices(len(self.data), self.positives).numpy()
        generator = generator_for(rng.seed, rng.step, rng.rank)
        batch = self.sample_batch(rows, self.negatives // rng.world_size, generator)
        detection = self.detector(batch.images.contiguous(memory_format=torch.channels_last))
        return compute_detector_losses(detection, batch)

    @torch.no_grad()
    def sample_batch(
        self, rows: np.ndarray, negatives: int, generator: torch.Generator
    ) -> DetectorBatch:
        """Load world images, add negatives, and transform and degrade all of them.

        Args:
            rows: (N,) rows of the training data.
            negatives: number of images without a person.
            generator: source of all random numbers.

        Returns:
            N + `negatives` shuffled images on the detector's device.
        """
        device = next(self.detector.parameters()).device
        with torch.autocast(device.type, enabled=False):
            images = torch.from_numpy(self.data.images[rows]).float() / 255
            parts = torch.from_numpy(self.data.parts[rows]).float()
            landmarks = torch.from_numpy(self.data.landmarks[rows])
            negative, negative_parts = make_negatives(
                images, parts, self.photos, negatives, generator
            )
            real = torch.arange(len(rows) + negatives) < len(rows)
            images = torch.cat([images, negative])
            parts = torch.cat([parts, negative_parts])
            landmarks = torch.cat([landmarks, torch.full((negatives, 5, 2), SIZE / 2)])
            order = torch.randperm(len(real), generator=generator)
            batch = DetectorBatch(
                *(tensor[order].to(device) for tensor in (images, real, landmarks, parts))
            )
            batch = apply_random_flip(apply_random_affine(batch, generator), generator)
            images = degrade(color_jitter(batch.images, generator, gray=0.2), generator)
            return DetectorBatch(images, batch.real, batch.landmarks, batch.parts.long())

    def validate(self) -> Mapping[str, float]:
        """Evaluate the detector on held-out people and on images without a person.

        Returns:
            The metrics of `evaluate_detector` (targets: `landmarks` 0.03, `iou` 0.9) and `refused`,
            the share of rejected negatives: photographs that were not trained on, noise, colors
            and images with the person removed.
        """
        if self.held_out is None:
            return {}
        return {
            **evaluate_detector(self.detector, self.held_out),
            "refused": self.rejection_rate(self.held_out),
        }

    def rejection_rate(self, data: WorldDataset, count: int = 128) -> float:
        """Measure the share of negatives in which no face is detected.

        Args:
            data: images from which some of the negatives are made.
            count: number of negatives.
        """
        generator = generator_for("strangers")
        rows = np.linspace(0, len(data) - 1, count).astype(int)
        images = torch.from_numpy(data.images[rows]).float() / 255
        parts = torch.from_numpy(data.parts[rows]).float()
        photos = self.held_out_photos or self.photos
        images, _ = make_negatives(images, parts, photos, count, generator)
        return float(np.mean([face is None for face in self.detector.detect(images)]))

    def sheet(self) -> Image.Image | None:
        """Draw the detections on training images.

        Landmarks are green, or red where no face is detected; the detected mask is brighter.
        """
        rows = np.linspace(0, len(self.data) - 1, 20).astype(int)
        batch = self.sample_batch(rows, 20, generator_for("sheet"))
        detection = self.detector(batch.images)
        images = (batch.images * (0.6 + 0.4 * detection.face)).cpu()
        for image, points, score in zip(
            images, detection.landmarks.cpu(), detection.score_logit.cpu(), strict=True
        ):
            color = torch.tensor([0.0, 1.0, 0.0] if score > 0 else [1.0, 0.0, 0.0])
            for x, y in points.clamp(1, SIZE - 2).long().tolist():
                image[:, y - 1 : y + 1, x - 1 : x + 1] = color[:, None, None]
        grid = images.unflatten(0, (-1, 10)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        return Image.fromarray((grid * 255).round().to(torch.uint8).numpy())


def compute_detector_losses(detection: MiniDetection, batch: DetectorBatch) -> dict[str, Tensor]:
    """Compute the losses of score, landmarks and parts.

    The landmark loss is a distance in pixels over the positives. In the parts loss the face weighs
    four times as much as the other labels.
    """
    real = batch.real.float()
    distance = (detection.landmarks - batch.landmarks).abs().mean((1, 2))
    weight = torch.ones(PARTS, device=detection.parts.device)
    weight[FACE] = 4.0
    return {
        "score": binary_cross_entropy_with_logits(detection.score_logit, real),
        "landmarks": 0.2 * (distance * real).sum() / real.sum().clamp(min=1),
        "parts": cross_entropy(detection.parts, batch.parts, weight, ignore_index=UNLABELED),
    }


def make_negatives(
    images: Tensor,
    parts: Tensor,
    photos: Mapping[str, Tensor],
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Make images without a face of the world.

    One third are made from world images, one third are photographs, and one third are synthetic.

    Args:
        images: (B, 3, 96, 96) world images in [0, 1].
        parts: (B, 96, 96) their part labels, float.
        photos: photographs by name; synthetic images replace them if there are none.
        count: number of images to make.
        generator: source of all random numbers.

    Returns:
        The images (count, 3, 96, 96) and their parts (count, 96, 96) float. Images that still show
        hair or clothes are `UNLABELED`, the other ones are background.
    """
    third = count // 3
    rows = torch.randperm(len(images), generator=generator)[:third]
    edits = [
        negative_images.shuffle_tiles,
        negative_images.remove_person,
        negative_images.erase_face,
        negative_images.erase_face,
    ]
    if photos:
        edits.append(partial(negative_images.paste_real_faces, photos=photos))
    edited = []
    labels = []
    for edit, chunk in zip(edits, rows.tensor_split(len(edits)), strict=True):
        if len(chunk):
            edited.append(edit(images[chunk], parts[chunk], generator=generator))
            label = 0.0 if edit is negative_images.remove_person else float(UNLABELED)
            labels.append(torch.full((len(chunk), SIZE, SIZE), label))
    singles = [
        negative_images.crop_photograph(photos, SIZE, generator)
        for _ in range(third if photos else 0)
    ]
    samplers = (
        negative_images.sample_noise,
        negative_images.sample_shapes,
        negative_images.sample_gradient,
        negative_images.sample_shapes,
    )
    while len(singles) < count - len(rows):
        singles.append(samplers[len(singles) % len(samplers)](SIZE, generator))
    labels.append(torch.zeros(len(singles), SIZE, SIZE))
    return torch.cat([*edited, torch.stack(singles)]), torch.cat(labels)


def apply_random_affine(batch: DetectorBatch, generator: torch.Generator) -> DetectorBatch:
    """Rotate, scale and shift each image with its labels.

    Pixels from outside an image are filled with one color and labeled as background.
    """
    device = batch.images.device
    matrix = random_affine(len(batch.images), SIZE, generator, turn=0.2, grow=0.25, shift=0.08).to(
        device
    )
    color = torch.rand(len(matrix), 3, 1, 1, generator=generator)
    color[::2] = 0.5  # the padding that `MiniFaceDetector.detect` adds
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
    return DetectorBatch(images, batch.real, landmarks, parts)


def apply_random_flip(batch: DetectorBatch, generator: torch.Generator) -> DetectorBatch:
    """Flip half of the images horizontally.

    Left and right landmarks are swapped, so that the left one keeps the smaller x.
    """
    flip = (torch.rand(len(batch.images), generator=generator) < 0.5).to(batch.images.device)
    images = torch.where(flip[:, None, None, None], batch.images.flip(-1), batch.images)
    parts = torch.where(flip[:, None, None], batch.parts.flip(-1), batch.parts)
    swapped = batch.landmarks[:, [1, 0, 2, 4, 3]]
    flipped = torch.stack([SIZE - swapped[..., 0], swapped[..., 1]], -1)
    landmarks = torch.where(flip[:, None, None], flipped, batch.landmarks)
    return DetectorBatch(images, batch.real, landmarks, parts)


@torch.no_grad()
def evaluate_detector(
    detector: MiniFaceDetector, data: WorldDataset, limit: int = 1024
) -> dict[str, float]:
    """Evaluate the detector on undegraded images.

    Args:
        detector: the network.
        data: images with people.
        limit: maximum number of images; they are spread evenly over the data.

    Returns:
        `landmarks`, the mean landmark error relative to the width of the face, `landmarks_p95`, its
        95th percentile, `iou` of the face mask and `found`, the share of detected faces.
    """
    device = next(detector.parameters()).device
    rows = np.unique(np.linspace(0, len(data) - 1, min(limit, len(data))).astype(int))
    errors = []
    ious = []
    scores = []
    for start in range(0, len(rows), 64):
        chunk = rows[start : start + 64]
        detection = detector(torch.from_numpy(data.images[chunk]).to(device).float() / 255)
        mask = torch.from_numpy(data.parts[chunk]).to(device)[:, None] == FACE
        width = mask.any(2).float().sum((1, 2)).clamp(min=1)
        points = torch.from_numpy(data.landmarks[chunk]).to(device)
        errors.append((detection.landmarks - points).norm(dim=-1).mean(1) / width)
        predicted = detection.face > 0
        intersection = (predicted & mask).sum((1, 2, 3))
        ious.append(intersection / (predicted | mask).sum((1, 2, 3)).clamp(min=1))
        scores.append(detection.score_logit)
    error = torch.cat(errors)
    return {
        "landmarks": error.mean().item(),
        "landmarks_p95": error.float().quantile(0.95).item(),
        "iou": torch.cat(ious).mean().item(),
        "found": (torch.cat(scores) > 0).float().mean().item(),
    }
