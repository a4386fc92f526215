"""Adapter files: the published names, with the settings of their training in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError

from openpulid.errors import TrainingError
from openpulid.methods.pulid import PuLID, PuLIDFlux
from openpulid.training.code_revision import revision
from openpulid.training.pulid.recipe import Recipe
from openpulid.training.trainer import TrainingResult


def save_adapter(
    adapter: PuLID | PuLIDFlux,
    path: str | PathLike[str],
    recipe: Recipe,
    result: TrainingResult,
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Save an adapter as one safetensors file that every PuLID loader opens.

    Tensors are named `id_adapter.*` and `id_adapter_attn_layers.N.id_to_{k,v}.weight`, for FLUX
    `pulid_encoder.*` and `pulid_ca.N.*`. The metadata holds the recipe (all settings, as JSON), the
    revision of the code, seed, steps, minutes and the last validation metrics.

    Args:
        adapter: the trained adapter.
        path: the file to write.
        recipe: of the training.
        result: of the training.
        metadata: further entries.

    Raises:
        TrainingError: the file cannot be written.
    """
    facts = {
        "recipe": json.dumps(asdict(recipe)),
        "revision": revision(),
        "seed": recipe.seed,
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 1),
        "metrics": json.dumps(dict(result.metrics)),
    }
    try:
        return adapter.save(path, {**facts, **(metadata or {})})
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path} could not be written ({error}): the training is complete, so free some disk "
            "space and run the same command again."
        ) from None
