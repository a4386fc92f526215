"""`pulid mini build`: the miniature from nothing, part after part.

    python -m openpulid.mini.train.build clip --minutes 10

A part that was stopped goes on where it was; one that is finished is only written and measured again. What each gave is
appended to `benchmarks/mini-build.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from openpulid.bench.measurement import append_measurement, describe_measurement
from openpulid.device import best_device
from openpulid.errors import OptionError
from openpulid.mini.train import baseline_stages as contest
from openpulid.mini.train import baselines as rivals
from openpulid.mini.train import stages as parts
from openpulid.mini.train.stages import BuildContext
from openpulid.pipelines.presets import MINIATURE

PARTS: dict[str, tuple[Callable[[BuildContext], dict[str, float]], float]] = {
    "world": (parts.world, 12),
    "finder": (parts.finder, 8),
    "recognition-encoder": (parts.recogniser("encoder", 11), 12),
    "recognition-loss": (parts.recogniser("loss", 12), 16),
    "recognition-scorer": (parts.recogniser("scorer", 13), 12),
    "clip": (parts.clip, 8),
    "values": (contest.values, 2),
    "vision": (parts.vision, 10),
    "reader": (parts.reader, 6),
    "autoencoder": (parts.autoencoder, 16),
    "base": (parts.base, 66),
    "lightning": (parts.lightning, 12),
    "stage1": (parts.stage("stage1"), 45),
    "naive": (parts.stage("naive"), 15),
    "stage2": (parts.stage("stage2"), 25),
    "stage3": (parts.stage("stage3"), 62),
}
"""Each part and its minutes on two cores: under four hours to the first adapter, a hundred minutes for the others."""
BASELINES: dict[str, tuple[Callable[[BuildContext], dict[str, float]], float]] = {
    name: (contest.part(name), 90) for name in rivals.NAMES
}
"""What `--method` names: PuLID's rivals, with the steps of its first stage and twice its minutes, if they need them."""


def build(
    names: Sequence[str] | None = None,
    minutes: float | None = None,
    device: str | None = None,
    fresh: bool = False,
    *,
    runs: Path = Path("runs/mini"),
    weights: Path = MINIATURE,
    report: Path = Path("benchmarks/mini-build.json"),
) -> dict[str, dict[str, float]]:
    """Trains the named parts, or all, in their order.

    Args:
        names: of `PARTS` or `BASELINES`; all of `PARTS` by default.
        minutes: for all of them together, shared as their usual minutes are; those by default. The world takes what it takes.
        device: where to compute; the best there is by default.
        fresh: begin again instead of continuing.
        runs: checkpoints, pictures and contact sheets; weights: what is shipped; report: the figures are appended here.

    Returns:
        part -> figures on held-out people.

    Raises:
        OptionError: no such part.
        WeightsError: a part needs another one that has not been built.
    """
    every = PARTS | BASELINES
    unknown = [name for name in names or () if name not in every]
    if unknown:
        raise OptionError(f"there is no part {unknown[0]!r}; the parts are {', '.join(every)}.")
    chosen = [name for name in every if (name in names if names else name in PARTS)]
    usual = sum(every[name][1] for name in chosen)
    found = {}
    for name in chosen:
        make, share = every[name]
        if fresh:
            shutil.rmtree(runs / name, ignore_errors=True)
        given = share if minutes is None else minutes * share / usual
        shop = BuildContext(runs, weights, torch.device(device) if device else best_device(), given)
        found[name] = make(shop)
        append(report, name, found[name], shop)
    return found


def append(report: Path, name: str, figures: Mapping[str, float], shop: BuildContext) -> None:
    """Add the figures of a part to a JSON file of measurements, and print them."""
    trained = {
        key: {"steps": result.steps, "minutes": round(result.seconds / 60, 1)}
        for key, result in shop.results.items()
    }
    measurement = describe_measurement(
        {"minutes": shop.minutes, "trained": trained},
        dict(figures),
        shop.device,
        command=f"pulid mini build {name} --minutes {shop.minutes:g}",
    )
    append_measurement(report, name, measurement)
    print(json.dumps({"name": name, **measurement}, indent=1), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "parts", nargs="*", help=f"in their order; all by default: {', '.join(PARTS)}"
    )
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--device")
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args()
    build(given.parts or None, given.minutes, given.device, given.fresh)


if __name__ == "__main__":
    main()
