"""Variants of stage 1 on FLUX's miniature, one change each: when does stage 1 converge?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from openpulid.errors import OptionError, suggest
from openpulid.mini.evaluation.variants import shorten
from openpulid.training.pulid import Recipe, find_recipe

RECIPE = "mini_flux_stage1"
SETTINGS: Mapping[str, Any] = {"logit_mean": 0.5, "lr": 3e-3}
"""What the recipe had before this comparison."""
REFERENCE = "recipe"
"""The variant without a further change."""

ModelName = Literal["base", "student", "guided"]


@dataclass(frozen=True)
class Condition:
    """A model, and the guidance that it is conditioned on.

    Attributes:
        model: the model.
        guidance: value of the guidance embedding; only the guided base has one.
    """

    model: ModelName
    guidance: float

    @property
    def label(self) -> str:
        """The name in the results, such as "base" or "guided 2.5"."""
        return f"guided {self.guidance:g}" if self.model == "guided" else self.model


@dataclass(frozen=True)
class Variant:
    """One change of `RECIPE` with `SETTINGS`.

    Attributes:
        group: what is changed; the plot has a part for each group.
        changes: fields of the recipe and their values.
        model: what the adapter trains on. The 4-step student predicts what a guided base does, at
            four noise levels. The guided base does at any level and for any guidance, as FLUX.1-dev
            does; its guidance is the recipe's `guidance_embedding`.
    """

    group: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    model: ModelName = "base"

    @property
    def condition(self) -> Condition:
        """The model and the guidance that the adapter trains with."""
        return Condition(self.model, variant_recipe(self, 1, 1).guidance_embedding)


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
    "guidance 1": Variant("guidance", model="guided"),
    "guidance 2.5": Variant("guidance", {"guidance_embedding": 2.5}, model="guided"),
    "guidance 4": Variant("guidance", {"guidance_embedding": 4.0}, model="guided"),
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
    recipe = replace(find_recipe(RECIPE), **{**SETTINGS, **variant.changes})
    every = max(1, steps // points)
    return replace(shorten(recipe, steps), batch=batch, validate_every=every)
