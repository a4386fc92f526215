"""Experiments on stage 1 with FLUX's architecture: train each variant a little, and measure it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpulid.io.checkpoints import module_fingerprint, read_metadata
from openpulid.io.files import write_json
from openpulid.mini.evaluation.added_size import measure_added_sizes
from openpulid.mini.evaluation.flux_models import FluxModels
from openpulid.mini.evaluation.flux_variants import (
    REFERENCE,
    VARIANTS,
    Condition,
    select_variants,
    variant_recipe,
)
from openpulid.mini.evaluation.variants import variant_folder
from openpulid.training import autocast
from openpulid.training.pulid import ADAPTER_FILE

MEASURE_BATCHES = 6
"""Batches of the last measurement: 288 images."""
RESULT_FILE = "result.json"
"""Everything that was measured of a variant, in its run directory."""
BUILD_STAGES = {"student": "flux-lightning", "guided": "flux-guidance"}
"""Model -> stage of `pulid mini build` that trains it; variants need the base in any case."""
DIGITS = 6


@dataclass(frozen=True)
class Experiments:
    """What all variants share.

    Attributes:
        steps: training steps of each.
        batch: images per step.
        runs: folder of the datasets; the trainings are stored below it.
        weights: folder of the miniature's weights.
        device: where to compute.
    """

    steps: int
    batch: int
    runs: Path
    weights: Path
    device: torch.device


def run_experiments(
    setup: Experiments,
    names: Iterable[str] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train and measure variants of stage 1; those that are finished are only read.

    A variant whose model is not trained yet is left out.

    Args:
        setup: what all variants share.
        names: variants besides the reference; all by default.
        log: receives a line per variant.

    Returns:
        Name of the variant -> its result, see `measure`.

    Raises:
        OptionError: there is no such variant.
        WeightsError: FLUX's base is not trained yet.
        TrainingError: a dataset does not exist yet.
    """
    variants = select_variants(names)
    models = FluxModels(setup.runs, setup.weights, setup.device)
    fingerprints = {
        name: module_fingerprint(pipe.transformer) for name, pipe in models.pipes.items()
    }
    parent = setup.runs / "sweep" / "flux-stage1"
    results = {}
    for name, variant in variants.items():
        if variant.model not in models.pipes:
            command = f"pulid mini build {BUILD_STAGES[variant.model]} --weights {setup.weights}"
            log(f"{name}: left out, its model is not trained yet ({command})")
            continue
        recipe = variant_recipe(variant, setup.steps, setup.batch)
        folder = variant_folder(parent, name, recipe, fingerprints[variant.model])
        measured = {c.model: fingerprints[c.model] for c in measured_conditions(name, models)}
        stored = _read(folder / RESULT_FILE)
        if stored is None or stored["models"] != measured:
            if not (folder / ADAPTER_FILE).exists():
                log(f"{name}: {setup.steps} steps")
                models.train(variant.model, recipe, folder)
            stored = {"models": measured, **measure(models, name, folder)}
            write_json(folder / RESULT_FILE, stored)
        results[name] = stored
    return results


def measure(models: FluxModels, name: str, folder: Path) -> dict[str, Any]:
    """Measure the adapter of a variant, on images and noise that are the same for all variants.

    Args:
        models: the models and data.
        name: of the variant.
        folder: its run directory.

    Returns:
        Its changes, training, curve, the losses of each image per model, the person in each, and
        the size of what the identity adds.
    """
    variant = VARIANTS[name]
    trained_on = variant.condition
    recipe = variant_recipe(VARIANTS[REFERENCE], 1, models.paired_data.batch_size)
    adapter = models.load_adapter(folder / ADAPTER_FILE)
    losses: dict[str, dict[str, list[float]]] = {}
    with torch.no_grad(), autocast(models.device, recipe.bf16):
        for condition in measured_conditions(name, models):
            recipe = replace(recipe, guidance_embedding=condition.guidance)
            task = models.create_task(condition.model, recipe, adapter)
            held_out = task.held_out_losses(models.paired_data, MEASURE_BATCHES)
            results = _to_lists(held_out.per_image)
            if name == REFERENCE:
                # an untrained adapter has no effect
                untrained_adapter = models.create_adapter(condition.model, recipe)
                task = models.create_task(condition.model, recipe, untrained_adapter)
                untrained = task.held_out_losses(models.paired_data, MEASURE_BATCHES, ["none"])
                results["untrained"] = _to_lists(untrained.per_image)["none"]
            losses[condition.label] = results
        recipe = replace(recipe, guidance_embedding=trained_on.guidance)
        task = models.create_task(trained_on.model, recipe, adapter)
        own_image = task.held_out_losses(models.own_image_data, MEASURE_BATCHES, ["own"])
        losses[trained_on.label] |= {"own_image": _to_lists(own_image.per_image)["own"]}
        sizes = measure_added_sizes(task, adapter, models.paired_data)
    metadata = read_metadata(folder / ADAPTER_FILE)
    return {
        "changes": dict(variant.changes),
        "trained_on": trained_on.label,
        "tokens": models.num_tokens,
        "recipe": json.loads(metadata["recipe"]),
        "steps": int(metadata["steps"]),
        "minutes": float(metadata["minutes"]),
        **read_curves(folder / "history.json"),
        "added": rounded(sizes),
        "losses": losses,
        "people": held_out.people.tolist(),
    }


def measured_conditions(name: str, models: FluxModels) -> list[Condition]:
    """Return the models, and their guidance, to measure a variant on.

    These are the base and what the variant trained with. The recipe is compared with all variants.
    """
    variants = VARIANTS.values() if name == REFERENCE else (VARIANTS[REFERENCE], VARIANTS[name])
    conditions = dict.fromkeys(variant.condition for variant in variants)
    return [condition for condition in conditions if condition.model in models.pipes]


def read_curves(history: Path) -> dict[str, list[dict[str, float]]]:
    """Read the validations, and the losses with the norm of the gradient, of a training."""
    records = json.loads(history.read_text("utf-8"))
    return {
        "curve": [
            {"step": record["step"], **rounded(record["metrics"])}
            for record in records
            if "metrics" in record
        ],
        "training": [
            {
                "step": record["step"],
                **rounded(record["losses"]),
                "gradient_norm": round(record["gradient_norm"], DIGITS),
            }
            for record in records
            if "losses" in record
        ],
    }


def rounded(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Round figures for a JSON file."""
    return {name: None if x is None else round(x, DIGITS) for name, x in values.items()}


def _to_lists(losses: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: [round(x, DIGITS) for x in values.tolist()] for name, values in losses.items()}


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.exists() else None
