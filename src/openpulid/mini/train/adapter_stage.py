"""Build stage of the PuLID adapters."""

from __future__ import annotations

from copy import deepcopy

from openpulid.mini.train.build_context import BuildContext
from openpulid.mini.train.pulid import adapter_file, train
from openpulid.training.pulid import find_recipe, save_adapter


def train_adapter(context: BuildContext, *, name: str) -> dict[str, float]:
    """Train the adapter of the recipe `mini_NAME` and write it in bfloat16.

    Args:
        context: of the build.
        name: name of the stage, such as "stage1" or "flux-stage1".
    """
    recipe = find_recipe(f"mini_{name}".replace("flux-", "flux_"))
    adapter, result = train(
        recipe,
        context.runs / name,
        minutes=context.minutes,
        device=context.device,
        runs=context.runs,
        weights=context.weights,
    )
    context.results[name] = result
    path = adapter_file(context.weights, name)
    save_adapter(deepcopy(adapter).bfloat16(), path, recipe, result)
    return dict(result.metrics)
