"""Variants of stage 1 on FLUX's miniature, one change each: when does stage 1 converge?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from openpulid.errors import OptionError, suggest
from openpulid.mini.evaluation.variants import shorten
from openpulid.training.pulid import Recipe, find_recipe

RECIPE = "mini_flux_stage1"
REFERENCE = "recipe"
"""The variant without a change."""

ModelName = Literal["base", "student"]


@dataclass(frozen=True)
class Variant:
    """One change of `RECIPE`.

    Attributes:
        group: what is changed; the plot has a part for each group.
        changes: fields of the recipe and their values.
        model: what the adapter trains on. The 4-step student predicts what a guided base does, as
            FLUX.1-dev does.
    """

    group: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    model: ModelName = "base"


VARIANTS: Mapping[str, Variant] = {
    REFERENCE: Variant(REFERENCE),
    "another seed": Variant("output projection, seed", {"seed": 1}),
    "random output": Variant("output projection, seed", {"zero_output": False}),
    "rate x0.1": Variant("learning rate", {"lr": 3e-4}),
    "rate x0.3": Variant("learning rate", {"lr": 1e-3}),
    "rate x3": Variant("learning rate", {"lr": 9e-3}),
    "AdamW 1e-4": Variant("learning rate", {"optimizer": "adamw", "lr": 1e-4}),
    "AdamW 1e-3": Variant("learning rate", {"optimizer": "adamw", "lr": 1e-3}),
    "noise mean 0": Variant("noise levels", {"logit_mean": 0.0}),
    "noise mean 1": Variant("noise levels", {"logit_mean": 1.0}),
    # nearly uniform: the logit of uniform numbers has a standard deviation of 1.81
    "noise spread": Variant("noise levels", {"logit_std": 1.8}),
    "places 2 and 4": Variant("places", {"double_interval": 2, "single_interval": 4}),
    "places first": Variant("places", {"single_interval": 6}),
    "own image": Variant("features", {"paired": False}),
    "student": Variant("guidance", model="student"),
}
"""The first block of each kind always has identity attention. "places 2 and 4" are the intervals of
FLUX, here three places. "places first" are three as well: both double blocks and a single one."""


def select_variants(names: Iterable[str] | None) -> dict[str, Variant]:
    """Return the variants with these names and the reference, in order; by default all.

    Raises:
        OptionError: there is no variant with one of the names.
    """
    if names is None:
        return dict(VARIANTS)
    selected = {REFERENCE, *names}
    for name in selected:
        if name not in VARIANTS:
            raise OptionError(
                f"there is no variant {name!r}{suggest(name, VARIANTS)}; "
                f"choose from {', '.join(VARIANTS)}."
            )
    return {name: variant for name, variant in VARIANTS.items() if name in selected}


def variant_recipe(variant: Variant, steps: int, batch: int, points: int = 6) -> Recipe:
    """Return the recipe of a variant's short training.

    Args:
        variant: the variant.
        steps: training steps.
        batch: images per step.
        points: validations, evenly spaced.
    """
    recipe = replace(find_recipe(RECIPE), **variant.changes)
    every = max(1, steps // points)
    return replace(shorten(recipe, steps), batch=batch, validate_every=every)
