"""Compute the metrics of a run."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from openpulid.bench.metrics import (
    FID,
    IDENTITY_METRICS,
    Attributes,
    DetectFaces,
    Faces,
    Metric,
    MetricInputs,
)
from openpulid.bench.run_dir import BASE, MethodMetrics, Run, RunDir, SampleKey
from openpulid.errors import ImageError
from openpulid.io.images import open_image

logger = logging.getLogger(__name__)

MAX_SIDE = 1024
"""Reference images are scaled down to this many pixels for the metrics."""

CACHED_PIXELS = 64 << 20
"""The base's images whose features are kept have together this many pixels: 256 MB of masks."""


class Scorers(Protocol):
    """The metric models of a benchmark; no method uses their face recognition model."""

    @property
    def faces(self) -> DetectFaces:
        """The face detector and face recognition model."""

    def metrics(self) -> Sequence[Metric]:
        """Return all metrics whose models are installed."""

    def method_metrics(self) -> Sequence[FID]:
        """Return new, empty metrics that give one number for all images of a method."""

    def facial_values(self, people: Sequence[str]) -> Tensor | None:
        """Return the true facial parameters (P, V) of the subjects; None for photos."""

    def attribute_classes(self, attributes: Mapping[str, str]) -> Mapping[str, int]:
        """Convert requested attributes to class indices of the attribute classifier."""


@dataclass(frozen=True)
class References:
    """The subjects of a run as the metric models see them.

    Attributes:
        images: (P, 3, H, W), the reference images.
        faces: their faces.
        second_faces: faces of the second images; None unless every subject has one.
        facial_values: (P, V), the true facial parameters; None for photos.
    """

    images: Tensor
    faces: Faces
    second_faces: Faces | None
    facial_values: Tensor | None


def load_references(run: Run, scorers: Scorers) -> References:
    """Load the images of all subjects of a run and detect their faces."""
    images = load_portraits([run.portrait(person) for person in run.people])
    second_paths = [run.second_image(person) for person in run.people]
    second_faces = None
    if all(path.is_file() for path in second_paths):
        second_faces = scorers.faces(load_portraits(second_paths))
    faces = scorers.faces(images)
    for person, has_face in zip(run.people, faces.has_face.tolist(), strict=True):
        if not has_face:
            logger.warning(
                "%s: the benchmark's model detects no face in the reference image; the subject has "
                "no scores of identity",
                person,
            )
    return References(images, faces, second_faces, scorers.facial_values(run.people))


def score_run(run_dir: RunDir, scorers: Scorers) -> None:
    """Write the metrics of every image into its record, and those of whole methods.

    Methods that are already scored are skipped.
    """
    run = run_dir.load()
    method_metrics = dict(run.method_metrics)
    references: References | None = None
    base_cache = BaseCache(scorers.faces)
    for method in run.methods:
        if not needs_scoring(run, method, scorers):
            continue
        # values of earlier images must not survive if scoring is stopped now
        if method_metrics.pop(method, None):
            run_dir.write_method_metrics(method_metrics)
        references = references or load_references(run, scorers)
        scorer = MethodScorer(run_dir, run, method, scorers, references, base_cache)
        method_metrics[method] = scorer.score()
        run_dir.write_method_metrics(method_metrics)


def needs_scoring(run: Run, method: str, scorers: Scorers) -> bool:
    """Return whether a metric of a method or of one of its images is missing."""
    if method != BASE:
        stored = run.method_metrics.get(method, {})
        if any(metric.name not in stored for metric in scorers.method_metrics()):
            return True
    names = [metric.name for metric in scorers.metrics()]
    return any(_is_unscored(run, key, names) for key in run.keys(method) if run.is_comparable(key))


def _is_unscored(run: Run, key: SampleKey, names: Sequence[str]) -> bool:
    record = run.records[key]
    expected = {
        name for name in names if run.suite.is_scored(key.prompt, identity=name in IDENTITY_METRICS)
    }
    if Attributes.name in expected and record.attributes is None:
        return True
    return not expected <= set(record.metrics)


@dataclass(frozen=True)
class BaseFeatures:
    """What the metric models compute from the base's images.

    Attributes:
        faces: their faces.
        outputs: network -> its output, see `MetricInputs.apply_to_base`.
    """

    faces: Faces
    outputs: dict[Callable[[Tensor], Any], Any]


class BaseCache:
    """Keeps what the metric models compute from the last batches of the base's images.

    All methods share them, and all subjects with the same seeds.

    Args:
        detect_faces: the face detector and face recognition model.
    """

    def __init__(self, detect_faces: DetectFaces) -> None:
        self.detect_faces = detect_faces
        self._features: dict[str, BaseFeatures] = {}

    def compute(self, images: Tensor) -> BaseFeatures:
        """Return the features of images (B, 3, H, W); the batch is recognized by its pixels."""
        pixels = images.permute(0, 2, 3, 1).numpy()  # as they were decoded
        key = f"{images.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}"
        features = self._features.pop(key, None)
        if features is None:
            features = BaseFeatures(self.detect_faces(images), {})
        # a suite has one batch per subject, or two: for metrics of identity and the other metrics
        limit = max(2, CACHED_PIXELS // images[:, 0].numel())
        self._features = dict([*self._features.items(), (key, features)][-limit:])
        return features


class MethodScorer:
    """Computes the metrics of one method.

    Args:
        run_dir: where the records are written.
        run: the run.
        method: name of the method.
        scorers: the metric models.
        references: the subjects.
        base_cache: shared by all methods.
    """

    def __init__(
        self,
        run_dir: RunDir,
        run: Run,
        method: str,
        scorers: Scorers,
        references: References,
        base_cache: BaseCache,
    ) -> None:
        self.run_dir = run_dir
        self.run = run
        self.method = method
        self.scorers = scorers
        self.references = references
        self.base_cache = base_cache
        # the base has none: it would be compared with itself
        self.method_metrics = scorers.method_metrics() if method != BASE else ()

    def score(self) -> MethodMetrics:
        """Write the metrics of all images; return those of the whole method."""
        # one subject after the other: all images of a large run do not fit into memory
        for person in self.run.people:
            self._score_person(person)
        return {metric.name: _to_number(metric.compute(), 4) for metric in self.method_metrics}

    def _score_person(self, person: str) -> None:
        keys = [
            key
            for key in self.run.keys(self.method)
            if key.person == person and self.run.is_comparable(key)
        ]
        if not self.run.suite.identity_prompts:
            self._score_images(keys, self.scorers.metrics(), self.method_metrics)
            return
        suite = self.run.suite
        self._score_images(
            [key for key in keys if suite.is_scored(key.prompt, identity=True)],
            [metric for metric in self.scorers.metrics() if metric.name in IDENTITY_METRICS],
            (),
        )
        self._score_images(
            [key for key in keys if suite.is_scored(key.prompt, identity=False)],
            [metric for metric in self.scorers.metrics() if metric.name not in IDENTITY_METRICS],
            self.method_metrics,
        )

    def _score_images(
        self, keys: Sequence[SampleKey], metrics: Sequence[Metric], method_metrics: Sequence[FID]
    ) -> None:
        """Compute metrics of images of one subject and write them into the records."""
        if not keys:
            return
        inputs = self._load_inputs(keys)
        columns = {metric.name: metric(inputs) for metric in metrics}
        attributes: Sequence[Mapping[str, bool] | None] = [None] * len(keys)
        for metric in metrics:
            if isinstance(metric, Attributes):
                attributes = metric.check(inputs)
        for row, key in enumerate(keys):
            record = self.run.records[key]
            values = {name: _to_number(column[row].item()) for name, column in columns.items()}
            scored = replace(
                record,
                metrics={**record.metrics, **values},
                attributes=record.attributes if attributes[row] is None else attributes[row],
            )
            self.run_dir.write_record(scored)
        for method_metric in method_metrics:
            method_metric.update(inputs)

    def _load_inputs(self, keys: Sequence[SampleKey]) -> MetricInputs:
        images = load_images([self.run.images[key] for key in keys])
        base_images = load_images([self.run.images[key.with_method(BASE)] for key in keys])
        base_features = self.base_cache.compute(base_images)
        subject = self.run.people.index(keys[0].person)
        subjects = torch.full((len(keys),), subject)
        second_faces = self.references.second_faces
        prompts = [self.run.suite.prompts[key.prompt] for key in keys]
        return MetricInputs(
            images=images,
            base_images=base_images,
            faces=self.scorers.faces(images),
            base_faces=base_features.faces,
            subjects=subjects,
            reference_images=self.references.images,
            reference_faces=self.references.faces,
            prompts=[prompt.text for prompt in prompts],
            requested=[self.scorers.attribute_classes(prompt.attributes) for prompt in prompts],
            second_faces=second_faces.select(subjects) if second_faces else None,
            facial_values=self.references.facial_values,
            base_outputs=base_features.outputs,
        )


def load_images(paths: Sequence[Path]) -> Tensor:
    """Load images of the same size, (B, 3, H, W) in [0, 1].

    Raises:
        ImageError: an image is damaged, or has another size than the first.
    """
    images = [open_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.size != images[0].size:
            raise ImageError(
                path,
                f"has {image.width} x {image.height} pixels, unlike the other images of its run; "
                "delete it, and `pulid bench run` generates it again",
            )
    return _to_tensor(images)


def load_portraits(paths: Sequence[Path]) -> Tensor:
    """Load images of any size, (B, 3, H, W) in [0, 1].

    If the sizes differ or exceed `MAX_SIDE`, each image is scaled without distortion and centered
    on a white square.
    """
    images = [open_image(path) for path in paths]
    longest_side = max(max(image.size) for image in images)
    if longest_side > MAX_SIDE or len({image.size for image in images}) > 1:
        side = min(longest_side, MAX_SIDE)
        images = [ImageOps.pad(image, (side, side), color="white") for image in images]
    return _to_tensor(images)


def _to_tensor(images: Sequence[Image.Image]) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 255


def _to_number(value: float, digits: int = 5) -> float | None:
    """Return a rounded number; None for NaN and infinity, which JSON does not have."""
    return round(value, digits) if math.isfinite(value) else None
