"""`pulid mini build`: train the miniature from scratch, stage by stage.

    python -m openpulid.mini.train.build clip --minutes 10

An interrupted stage continues where it stopped; a finished one is only written and measured again.
The figures of every stage are appended to `benchmarks/mini-build.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from openpulid.bench.measurement import append_measurement, describe_measurement
from openpulid.device import select_device
from openpulid.errors import OptionError, suggest
from openpulid.mini.models import LATENT_PATCHES
from openpulid.mini.train.baseline_stages import BASELINE_STAGES
from openpulid.mini.train.build_context import BuildContext, Stage
from openpulid.mini.train.flux_stages import FLUX_STAGES
from openpulid.mini.train.guidance_stage import GUIDANCE_STAGE
from openpulid.mini.train.stages import STAGES
from openpulid.mini.train.style_stage import STYLE_STAGE
from openpulid.pipelines.presets import MINIATURE
from openpulid.world.dataset import Plan


def build(
    names: Sequence[str] | None = None,
    minutes: float | None = None,
    device: str | None = None,
    fresh: bool = False,
    *,
    people: int | None = None,
    begin: Path | None = None,
    tokens: int = 36,
    runs: Path = Path("runs/mini"),
    weights: Path = MINIATURE,
    report: Path = Path("benchmarks/mini-build.json"),
) -> dict[str, dict[str, float]]:
    """Train the named stages, or all, in their order.

    Args:
        names: names of `STAGES`, `FLUX_STAGES` or `BASELINE_STAGES`, "flux-guidance" or "style";
            by default all of `STAGES`.
        minutes: time budget of all stages together, shared in proportion to their usual durations;
            by default those. Rendering the world ignores the budget.
        device: where to compute; by default the best device.
        fresh: delete earlier runs of the stages first.
        people: number of people in the training images; by default that of `Plan`.
        begin: folder of a pipeline whose networks the base starts from; by default it starts
            from nothing.
        tokens: image tokens of FLUX's base, 36 or 144.
        runs: folder of datasets, checkpoints and sample sheets.
        weights: folder where the weights are written.
        report: JSON file to which the figures are appended.

    Returns:
        Name of the stage -> figures on held-out people.

    Raises:
        OptionError: there is no stage with one of the names, or no layout of so many tokens.
        WeightsError: a stage needs another one that is not built yet.
    """
    stages = select_stages(names)
    if tokens not in LATENT_PATCHES:
        raise OptionError(f"--tokens is 36 or 144, got {tokens}.")
    torch_device = select_device(device)
    usual_minutes = sum(stage.minutes for stage in stages)
    results = {}
    for stage in stages:
        budget = stage.minutes if minutes is None else minutes * stage.minutes / usual_minutes
        context = BuildContext(runs, weights, torch_device, budget, begin=begin, tokens=tokens)
        if people is not None:
            context.plan = Plan(people=people)
        if fresh:
            stage.delete_runs(context)
        results[stage.name] = stage.train(context)
        append_figures(report, stage.name, results[stage.name], context)
    return results


def select_stages(names: Sequence[str] | None) -> list[Stage]:
    """Return the stages with these names, and those that they need, in the order of the build.

    Without names these are all of `STAGES`.

    Raises:
        OptionError: there is no stage with one of the names.
    """
    if not names:
        return list(STAGES)
    stages = [*STAGES, *FLUX_STAGES, GUIDANCE_STAGE, *BASELINE_STAGES, STYLE_STAGE]
    known_names = [stage.name for stage in stages]
    for name in names:
        if name not in known_names:
            raise OptionError(
                f"there is no part {name!r}{suggest(name, known_names)}; "
                f"choose from {', '.join(known_names)}."
            )
    selected = set(names)
    for stage in stages:
        if stage.name in names:
            selected.update(stage.needs)
    return [stage for stage in stages if stage.name in selected]


def append_figures(
    report: Path, name: str, figures: Mapping[str, float], context: BuildContext
) -> None:
    """Add the figures of a stage to a JSON file of measurements, and print them."""
    trainings = {
        training: {"steps": result.steps, "minutes": round(result.seconds / 60, 1)}
        for training, result in context.results.items()
    }
    measurement = describe_measurement(
        {"minutes": context.minutes, "trained": trainings},
        dict(figures),
        context.device,
        command=f"pulid mini build {name} --minutes {context.minutes:g}",
    )
    append_measurement(report, name, measurement)
    print(json.dumps({"name": name, **measurement}, indent=1), file=sys.stderr)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = ", ".join(stage.name for stage in STAGES)
    parser.add_argument("parts", nargs="*", help=f"parts to build; all by default: {names}")
    parser.add_argument("--minutes", type=float, help="time budget of all parts together")
    parser.add_argument("--device", help="where to compute")
    parser.add_argument("--fresh", action="store_true", help="delete earlier runs first")
    options = parser.parse_args()
    build(options.parts or None, options.minutes, options.device, options.fresh)


if __name__ == "__main__":
    main()
