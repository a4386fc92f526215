"""Compare the methods of a run at equal identity similarity, with paired differences per person.

A method that shows less of the identity also changes less of the image. Each row of a method is
therefore compared with the reference method at the scale where both have the same mean face_sim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from openpulid.bench.metrics import (
    IDENTITY_METRICS,
    Attributes,
    ClipI,
    ClipT,
    Dino,
    FaceSim,
    Interval,
    LpipsOutside,
    OutsideFace,
)
from openpulid.bench.metrics.bootstrap import draw_subjects, percentile_interval
from openpulid.bench.run_dir import BASE, Run
from openpulid.pipelines.baselines import BASELINES

PRESERVATION = {
    metric.name: metric.higher_is_better
    for metric in (ClipT, ClipI, Dino, OutsideFace, LpipsOutside, Attributes)
}
"""Metrics that are compared, where they were measured -> whether more is better."""

MIN_SHARE = 0.95
"""A row that is on the reference's curve in fewer bootstrap samples is reported."""


class HasScale(Protocol):
    """Results of a method at one scale, such as a row of the table."""

    @property
    def method(self) -> str:
        """METHOD or METHOD@SCALE."""

    @property
    def scale(self) -> float:
        """The identity scale."""


Results = TypeVar("Results", bound=HasScale)


@dataclass(frozen=True)
class Samples:
    """The results of METHOD or METHOD@SCALE, per image.

    Attributes:
        method: its name in the run.
        scale: identity scale.
        is_tuned: whether the method was tuned on each person.
        values: metric -> (P, K) of the K prompts and seeds of each person; NaN if missing.
    """

    method: str
    scale: float
    is_tuned: bool
    values: Mapping[str, Tensor]

    @property
    def has_face_sim(self) -> bool:
        """Whether any image has an identity similarity."""
        return not bool(self.values[FaceSim.name].isnan().all())


@dataclass(frozen=True)
class Point:
    """The results of METHOD or METHOD@SCALE, per person.

    Attributes:
        method: its name in the run.
        scale: identity scale.
        means: metric -> (P,) mean over images of each person; NaN without images.
    """

    method: str
    scale: float
    means: Mapping[str, Tensor]

    @property
    def face_sim(self) -> Tensor:
        """The identity similarity, (P,)."""
        return self.means[FaceSim.name]


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two methods in one metric.

    Attributes:
        interval: mean over people of the reference minus the other method.
        num_better: number of people for whom the reference is better.
        num_people: number of people for whom both were measured.
    """

    interval: Interval
    num_better: int
    num_people: int


@dataclass(frozen=True)
class Match:
    """A row of a method, and the reference at the same mean similarity.

    Attributes:
        method: METHOD or METHOD@SCALE.
        face_sim: mean over people, equal for both.
        scale: of the reference, between two of its rows.
        differences: metric -> reference minus method.
        share: of the bootstrap samples of people in which the reference has this similarity.
    """

    method: str
    face_sim: float
    scale: float
    differences: Mapping[str, PairedDifference]
    share: float


@dataclass(frozen=True)
class EqualSimilarity:
    """The comparison of all methods of a run with a reference.

    Attributes:
        reference: name of the reference method.
        matches: one for each row within the similarity of the reference's curve.
        notes: sentences on rows that are left out, or on why there is no comparison.
    """

    reference: str
    matches: Sequence[Match]
    notes: Sequence[str]


def compare_at_equal_similarity(run: Run) -> EqualSimilarity | None:
    """Compare every method with PuLID, or without it with the first one that has a scale.

    The curve of the reference begins with the base, at scale 0. The reference is interpolated per
    person, linearly between two neighboring scales, at the fraction where its mean face_sim equals
    that of the other method. Where the curve passes this similarity twice, the lower scale is used.
    The fraction is estimated from the same people as the differences, so the bootstrap interpolates
    again in each of its samples.

    Args:
        run: the run.

    Returns:
        The comparison; None if the run has fewer than two methods with images.
    """
    methods = [read_samples(run, method) for method in run.methods if method != BASE]
    curves = group_curves([samples for samples in methods if samples.has_face_sim])
    # A run may have begun with another method, and methods may be added.
    names = sorted(curves, key=lambda name: name != "pulid")
    reference = next((name for name in names if has_scale(name)), None)
    if reference is None or len(curves) < 2:
        return None
    reference_samples = curves.pop(reference)
    if len(reference_samples) < 2:
        note = (
            f"The comparison at equal similarity needs {reference} at several scales: run the "
            "command again with `--scales 0.3,0.5,1`, or name them, as in "
            f"`--methods {reference}@0.3,{reference}@0.5,{reference}`."
        )
        return EqualSimilarity(reference, [], [note])
    base = read_samples(run, BASE)
    # The base is the reference at scale 0: the same prompts and seeds without the identity. A tuned
    # method has another prompt, with the word for the person.
    if base.has_face_sim and not reference_samples[0].is_tuned:
        reference_samples = [base, *reference_samples]

    matches = []
    notes = []
    for samples in (samples for rows in curves.values() for samples in rows):
        *curve, point = average_common_images([*reference_samples, samples])
        people = ~point.face_sim.isnan()
        if not people.any():
            notes.append(
                f"{point.method} is left out: no prompt and seed has an image of it and of all "
                f"rows of {reference}."
            )
            continue
        match = match_point(curve, point, people)
        if match is None:
            similarities = [row.face_sim[people].mean().item() for row in curve]
            notes.append(
                f"{point.method} is left out: its face_sim of "
                f"{point.face_sim[people].mean().item():.3f} is outside the curve of {reference}, "
                f"{min(similarities):.3f} to {max(similarities):.3f}."
            )
            continue
        matches.append(match)
        if match.share < MIN_SHARE:
            notes.append(
                f"{point.method} is near an end of the curve of {reference}: its face_sim is on "
                f"the curve in {match.share:.0%} of the bootstrap samples, and its intervals are "
                "from these alone."
            )
    return EqualSimilarity(reference, matches, notes)


def match_point(curve: Sequence[Point], point: Point, people: Tensor) -> Match | None:
    """Compare a row of a method with the reference at the same mean similarity.

    Args:
        curve: C rows of the reference, by increasing scale.
        point: the row of the method.
        people: (P,) bool, the people who are compared.

    Returns:
        The comparison; None if the reference does not have the similarity of the row.
    """
    rows = [*curve, point]
    similarities = torch.stack([row.face_sim[people] for row in rows])
    draws = draw_subjects(int(people.sum()))
    weights = find_weights(similarities.mean(1)[None])
    if weights.isnan().any():
        return None
    resampled_weights = find_weights(similarities[:, draws].mean(2).T)

    differences = {}
    for name, higher_is_better in PRESERVATION.items():
        values = torch.stack([row.means[name][people] for row in rows])
        difference = weights[0] @ values
        if difference.isnan().all():
            continue
        resampled = (resampled_weights * values[:, draws].nanmean(2).T).sum(1)
        differences[name] = summarize(difference, resampled, higher_is_better)
    scales = torch.tensor([row.scale for row in curve], dtype=torch.float64)
    return Match(
        point.method,
        face_sim=similarities[-1].mean().item(),
        scale=(weights[0, :-1] @ scales).item(),
        differences=differences,
        share=1 - resampled_weights.isnan().any(1).double().mean().item(),
    )


def find_weights(similarities: Tensor) -> Tensor:
    """Find the differences "reference minus method at equal similarity", as weights of the rows.

    Args:
        similarities: (R, C + 1), in each of R samples of people the mean similarities of C rows of
            the reference, by increasing scale, and of the method.

    Returns:
        (R, C + 1): weights of the reference's two neighboring rows, which sum to 1, and -1 for the
        method. NaN in a sample where the reference does not have the method's similarity.
    """
    weights = torch.zeros_like(similarities)
    weights[:, -1] = -1
    for sample, (*curve, similarity) in enumerate(similarities.tolist()):
        segment = find_segment(curve, similarity)
        if segment is None:
            weights[sample] = math.nan
            continue
        index, fraction = segment
        weights[sample, index] = 1 - fraction
        weights[sample, index + 1] = fraction
    return weights


def read_samples(run: Run, method: str) -> Samples:
    """Read the metrics of all images of a row of the run."""
    suite = run.suite
    num_prompts = max(len(suite.prompts_of(person)) for person in run.people)
    shape = (len(run.people), num_prompts * len(suite.seeds))
    names = (FaceSim.name, *PRESERVATION)
    values = {name: torch.full(shape, math.nan, dtype=torch.float64) for name in names}
    scale = math.nan
    is_tuned = False
    for key in run.keys(method):
        record = run.records.get(key)
        if record is None or not record.is_done:
            continue
        scale = record.configuration.get("scale", 0.0)
        is_tuned = "recipe" in record.configuration
        row = run.people.index(key.person)
        column = suite.prompts_of(key.person).index(key.prompt) * len(suite.seeds)
        column += run.seeds(key.person).index(key.seed)
        for name in names:
            value = record.metrics.get(name)
            is_scored = suite.is_scored(key.prompt, identity=name in IDENTITY_METRICS)
            if is_scored and value is not None:
                values[name][row, column] = value
    return Samples(method, scale, is_tuned, values)


def average_common_images(rows: Sequence[Samples]) -> list[Point]:
    """Average each metric over the prompts and seeds that all rows have, for each person.

    A row may lack images, for example in an unfinished run. The prompts differ, so the means over
    all images of each row would not be paired.
    """
    means: dict[str, Tensor] = {}
    for name in (FaceSim.name, *PRESERVATION):
        values = torch.stack([row.values[name] for row in rows])  # R P K
        is_incomplete = values.isnan().any(0)
        means[name] = values.masked_fill(is_incomplete, math.nan).nanmean(2)
    return [
        Point(row.method, row.scale, {name: values[index] for name, values in means.items()})
        for index, row in enumerate(rows)
    ]


def group_curves(rows: Sequence[Results]) -> dict[str, list[Results]]:
    """Group the rows METHOD and METHOD@SCALE of each method, by increasing scale."""
    curves: dict[str, list[Results]] = {row.method.partition("@")[0]: [] for row in rows}
    for row in rows:
        curves[row.method.partition("@")[0]].append(row)
    for curve in curves.values():
        curve.sort(key=lambda row: row.scale)
    return curves


def find_segment(curve: Sequence[float], value: float) -> tuple[int, float] | None:
    """Find where a piecewise linear curve first has a value.

    Args:
        curve: values at the corners.
        value: the value.

    Returns:
        Index of the corner before it, and the fraction of the way to the next one; None if the
        curve does not have the value.
    """
    for index, (start, end) in enumerate(pairwise(curve)):
        if min(start, end) <= value <= max(start, end):
            return index, (value - start) / (end - start) if end != start else 0.0
    return None


def summarize(difference: Tensor, resampled: Tensor, higher_is_better: bool) -> PairedDifference:
    """Summarize the differences of two methods.

    Args:
        difference: (P,) one per person; NaN is ignored.
        resampled: (R,) mean difference in each bootstrap sample of people; NaN is ignored.
        higher_is_better: the direction of the metric.
    """
    valid = difference[~difference.isnan()]
    is_better = valid > 0 if higher_is_better else valid < 0
    interval = Interval(valid.mean().item())
    if len(valid) > 1 and not resampled.isnan().all():
        interval = percentile_interval(interval.mean, resampled[~resampled.isnan()])
    return PairedDifference(interval, int(is_better.sum()), len(valid))


def has_scale(method: str) -> bool:
    """Return whether a method, named without @SCALE, has an identity scale."""
    return method not in BASELINES or "scale" not in BASELINES[method].unused
