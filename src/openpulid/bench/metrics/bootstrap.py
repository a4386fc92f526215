"""How sure a mean is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean and the range that it would fall into in 95 of 100 repetitions with other people; `low` and `high` are NaN where
    that cannot be told."""

    mean: float
    low: float
    high: float


def bootstrap(values: Tensor, groups: Tensor, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean with a 95% percentile bootstrap interval over people (Efron 1979; cluster bootstrap).

    Images of one person are alike, so people, not images, are drawn again; every person weighs the same.

    Args:
        values: (B,) one number per image; NaN is left out.
        groups: (B,) whose image it is.

    Returns:
        the mean over people of their own means; its range is NaN for fewer than two people, all is where no value is left.
    """
    kept = ~values.isnan()
    means = [values[kept & (groups == group)].double().mean() for group in groups[kept].unique()]
    if not means:
        return Interval(float("nan"), float("nan"), float("nan"))
    people = torch.stack(means)
    if len(people) < 2:  # every draw would be the same person, and the mean look certain
        return Interval(people.mean().item(), float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(people), (resamples, len(people)), generator=generator)
    low, high = (
        people[drawn]
        .mean(dim=1)
        .quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        .tolist()
    )
    return Interval(people.mean().item(), low, high)
