"""The losses of held-out people as figures: their means, and what the own identity gains."""

from __future__ import annotations

from statistics import stdev
from typing import NamedTuple

import torch
from torch import Tensor

from openpulid.training.pulid.recipe import Recipe

HELD_OUT_BATCHES = 4
HELD_OUT_SEED = 0
"""Recipes of any seed are validated with the same images and noise."""


class HeldOutLosses(NamedTuple):
    """L_diff of N images of held-out people, from the same noise.

    Attributes:
        per_image: "own", "other" and "none", the identity that was shown -> (N,). NaN where a batch
            has no other identity to show.
        people: (N,) number of the person in each image.
    """

    per_image: dict[str, Tensor]
    people: Tensor


def count_parts(recipe: Recipe, world_size: int) -> int:
    """Return in how many parts a held-out batch is processed.

    One process validates alone and has memory for its share of a step. Each part has at least two
    people, so that identities can be swapped.
    """
    for parts in range(recipe.accumulate * world_size, 1, -1):
        divides = recipe.batch % parts == 0 and recipe.few_step_batch % parts == 0
        if divides and recipe.batch // parts > 1:
            return parts
    return 1


def summarize_held_out(losses: HeldOutLosses) -> dict[str, float]:
    """Compute the means of the losses, and the gains of the own identity.

    Images of one person have the same identity, and a small data set repeats its images. So the
    standard error is that of the people's mean gains.

    Args:
        losses: see `PuLIDTask.held_out_losses`.

    Returns:
        See `PuLIDTask.validate`. The standard error is NaN for a single person.
    """
    per_image = losses.per_image
    everyone = torch.ones_like(losses.people, dtype=torch.bool)
    has_other = ~per_image["other"].isnan()
    metrics = {}
    for name, rows in (("own", everyone), ("other", has_other), ("none", everyone)):
        metrics[f"held_out_{name}"] = per_image[name][rows].mean().item()
        if name != "own":
            gain = (per_image[name] - per_image["own"])[rows]
            metrics[f"held_out_over_{name}"] = gain.mean().item()
            metrics[f"held_out_over_{name}_se"] = standard_error(gain, losses.people[rows])
    return metrics


def standard_error(gain: Tensor, people: Tensor) -> float:
    """Compute the standard error of a mean gain (N,) of images over people (N,)."""
    means = [gain[people == person].mean().item() for person in people.unique()]
    return stdev(means) / len(means) ** 0.5 if len(means) > 1 else float("nan")
