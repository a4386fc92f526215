"""Confidence intervals of means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval.

    Attributes:
        mean: mean over subjects.
        low: lower end of the interval, NaN if it cannot be estimated.
        high: upper end of the interval, NaN if it cannot be estimated.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan


def draw_subjects(num_subjects: int, *, resamples: int = 2000, seed: int = 0) -> Tensor:
    """Draw R bootstrap samples of N subjects: indices (R, N), with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_subjects, (resamples, num_subjects), generator=generator)


def percentile_interval(mean: float, resampled_means: Tensor) -> Interval:
    """Return a mean with the 95% percentile interval of its R resampled values, (R,)."""
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = resampled_means.double().quantile(quantiles).tolist()
    return Interval(mean, low, high)


def bootstrap(values: Tensor, groups: Tensor) -> Interval:
    """Compute a mean with a 95% percentile bootstrap interval over subjects.

    Cluster bootstrap (Efron 1979): images of one subject are correlated, so subjects are
    resampled, not images. Every subject has the same weight.

    Args:
        values: (B,) one number per image; NaN is ignored.
        groups: (B,) the subject of each image.

    Returns:
        The mean over subjects of their own means. The interval is NaN with fewer than two
        subjects; everything is NaN without any value.
    """
    valid = ~values.isnan()
    means = [values[valid & (groups == group)].double().mean() for group in groups[valid].unique()]
    if not means:
        return Interval(math.nan)
    subject_means = torch.stack(means)
    mean = subject_means.mean().item()
    if len(means) < 2:  # every resample would be the same subject and the mean look certain
        return Interval(mean)
    return percentile_interval(mean, subject_means[draw_subjects(len(means))].mean(dim=1))
