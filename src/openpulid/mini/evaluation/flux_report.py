"""Figures and plot of the experiments on stage 1 with FLUX's architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from openpulid.bench.measurement import describe_measurement, replace_measurement
from openpulid.io.files import replace_file
from openpulid.mini.evaluation.flux_stage1 import Experiments, rounded
from openpulid.mini.evaluation.flux_variants import REFERENCE, VARIANTS, variant_recipe
from openpulid.training.pulid import HeldOutLosses, standard_error, summarize_held_out

ABOUT = "When stage 1 converges on FLUX's architecture: short trainings on the miniature"
METRIC = "held_out_over_other"
OMITTED = ("losses", "people", "models")
"""Parts of a result that the report leaves out."""


def write_report(path: Path, setup: Experiments, results: Mapping[str, Any]) -> dict[str, Any]:
    """Write the measurement of these results into a JSON file, and return its figures.

    Args:
        path: the file; an earlier measurement with as many tokens, steps and images is replaced.
        setup: what the variants share.
        results: of `run_experiments`.

    Raises:
        OptionError: the file holds something else, or cannot be written.
    """
    reference = results[REFERENCE]
    figures = summarize(results)
    configuration = {
        "recipe": asdict(variant_recipe(VARIANTS[REFERENCE], setup.steps, setup.batch)),
        "tokens": reference["tokens"],
        "models": reference["models"],
        "held_out_images": len(reference["losses"]["base"]["own"]),
    }
    name = f"{reference['tokens']} tokens, {setup.steps} steps of {setup.batch} images"
    measurement = describe_measurement(configuration, figures, setup.device)
    replace_measurement(path, ABOUT, name, measurement)
    return figures


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the losses of each image into figures: means, gains, and differences to the reference.

    Args:
        results: of `run_experiments`.

    Returns:
        Variant -> figures. `held_out_untrained` is the loss of the model itself. `versus_recipe` is
        the gain minus that of the reference on the same images and noise, so its standard error is
        smaller than those of the gains.
    """
    reference = results[REFERENCE]["losses"]
    rows = {}
    for name, result in results.items():
        row = {key: value for key, value in result.items() if key not in OMITTED}
        row |= rounded({"added_mean": fmean(result["added"].values())})
        row["measured"] = {
            model: _figures(
                _to_tensors(losses), _to_tensors(reference[model]), torch.tensor(result["people"])
            )
            for model, losses in result["losses"].items()
        }
        rows[name] = row
    return rows


def _figures(
    losses: Mapping[str, Tensor], reference: Mapping[str, Tensor], people: Tensor
) -> dict[str, Any]:
    three = {name: losses[name] for name in ("own", "other", "none")}
    gains = summarize_held_out(HeldOutLosses(three, people))
    figures = rounded({"held_out_untrained": reference["untrained"].mean().item(), **gains})
    if "own_image" in losses:
        copied = losses["own"] - losses["own_image"]
        figures |= _mean_and_error("own_image_over_other_image", copied, people)
    for name in ("none", "other"):
        difference = (losses[name] - losses["own"]) - (reference[name] - reference["own"])
        figures |= _mean_and_error(f"over_{name}_versus_recipe", difference, people)
    return figures


def _mean_and_error(name: str, values: Tensor, people: Tensor) -> dict[str, float]:
    return rounded({name: values.mean().item(), f"{name}_se": standard_error(values, people)})


def _to_tensors(losses: Mapping[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}


def plot_curves(rows: Mapping[str, Any], path: Path) -> None:
    """Plot the gain of the own identity over another during training, a part for each group.

    Bands are one standard error over the people. The recipe without a change is in every part.

    Args:
        rows: variant -> figures with a "curve".
        path: the image to write.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(VARIANTS[name].group for name in rows if name != REFERENCE))
    figure = Figure(figsize=(13, 8), layout="constrained")
    parts = figure.subplots(2, 3, sharex=True, squeeze=False).flat
    for axes, group in zip(parts, groups or [REFERENCE], strict=False):
        names = [name for name in rows if VARIANTS[name].group == group]
        for name in dict.fromkeys([REFERENCE, *names]):
            color = "black" if name == REFERENCE else None
            _plot_curve(axes, rows[name]["curve"], name, color)
        axes.axhline(0, color="gray", linewidth=0.6)
        axes.set(title=group, xlabel="step", ylabel="held-out loss: other minus own")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _plot_curve(axes: Any, curve: list[dict[str, Any]], label: str, color: str | None) -> None:
    steps = [point["step"] for point in curve]
    means = [point[METRIC] for point in curve]
    errors = [point[f"{METRIC}_se"] or 0.0 for point in curve]
    (line,) = axes.plot(steps, means, marker=".", label=label, color=color)
    low = [mean - error for mean, error in zip(means, errors, strict=True)]
    high = [mean + error for mean, error in zip(means, errors, strict=True)]
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
