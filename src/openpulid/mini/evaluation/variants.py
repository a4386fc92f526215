"""Short trainings of recipe variants: what the sweeps have in common."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

from openpulid.training.pulid import Recipe


def shorten(recipe: Recipe, steps: int) -> Recipe:
    """Return a recipe for a short training, with the learning rate schedule of a complete one."""
    warmup = max(1, steps // 20)
    return replace(recipe, warmup=warmup, ema=0.98, steps=min(steps, recipe.steps))


def variant_folder(parent: Path, name: str, recipe: Recipe, base: str) -> Path:
    """Return the run directory of a variant, another one for every recipe and base.

    So an adapter that exists in it needs no check, and an interrupted training continues.

    Args:
        parent: folder of all variants.
        name: of the variant.
        recipe: of the variant.
        base: fingerprint of what the adapter trains on and begins with.
    """
    content = json.dumps([asdict(recipe), base])
    digest = blake2b(content.encode(), digest_size=4).hexdigest()
    return parent / f"{name.replace(', ', '-').replace(' ', '-')}-{digest}"
