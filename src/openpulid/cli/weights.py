"""The commands about published weights and presets: what there is, what is here, what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openpulid.cli.options import group
from openpulid.errors import OptionError, WeightsError
from openpulid.pipelines.request import parse_size

weights = group("Published weights: list, get, verify. Only `get` asks a network.")
presets = group("What can be generated with, and what it takes.")

Name = Annotated[
    list[str],
    typer.Argument(
        help="Presets (sdxl ...), methods, names from `pulid weights list`, or OWNER/NAME."
    ),
]
Where = Annotated[
    Path | None,
    typer.Option("--folder", help="Where they lie; PULID_WEIGHTS and the hub's cache by default."),
]


@weights.command("list")
def list_weights(folder: Where = None) -> None:
    """All published weights that openpulid can use, their licences, and where they lie on this machine."""
    from rich.console import Console
    from rich.table import Table

    from openpulid.io.hub import SHA256, WEIGHTS, locate

    table = Table("name", "file", "MB", "licence", "sha256", "here")
    for name, entry in WEIGHTS.items():
        try:
            here = str(locate(name, folder))
        except WeightsError:
            here = "-"
        licence = entry.license if entry.commercial else f"{entry.license} (not commercial)"
        table.add_row(
            name, entry.name, str(entry.megabytes), licence, SHA256.get(name, "-")[:12], here
        )
    Console().print(table)


@weights.command()
def get(names: Name, folder: Where = None) -> None:
    """Download what is missing; from the hub a connection that breaks is taken up where it was."""
    from openpulid.io.hub import download as download

    for name in _needed([part for given in names for part in _of_method(given)]):
        print(download(name, folder))


@weights.command()
def verify(names: Name, folder: Where = None) -> None:
    """Read weights from end to end and compare them with what is known of them, or what the hub said at the download."""
    from openpulid.io.hub import verify_weights as check

    for name in _needed(names):
        print(f"{name}: {check(name, folder)}")


@presets.command("list")
def list_presets() -> None:
    """All presets, and whether what they need is on this machine, with the methods that are."""
    from rich.console import Console
    from rich.table import Table

    from openpulid.pipelines.factory import installed_methods, missing_weights
    from openpulid.pipelines.presets import PRESETS

    table = Table("preset", "what it is", "steps", "guidance", "here")
    for name, make in PRESETS.items():
        preset = make()
        here = (
            f"`pulid weights get {name}`"
            if missing_weights(preset)
            else f"yes: {', '.join(installed_methods(preset))}"
        )
        said = (make.__doc__ or "").split("\n")[0].split(":")[0].rstrip(".")
        table.add_row(name, said, str(preset.steps), f"{preset.guidance:g}", here)
    Console().print(table)


@presets.command()
def memory(
    preset: Annotated[str, typer.Argument(help="flux, flux-krea or flux-schnell.")] = "flux",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; the preset's by default.")] = None,
) -> None:
    """What each memory level will take on the device, by phase and component: predicted from shapes and dtypes."""
    from rich.console import Console
    from rich.table import Table

    from openpulid.pipelines.flux_memory import GIB, LEVELS, predict_memory
    from openpulid.pipelines.presets import find_preset

    chosen = find_preset(preset)
    if chosen.family != "flux":
        raise OptionError(f"{preset} has one way of lying in memory; the levels are FLUX's.")
    width, height = parse_size(size, 16) or chosen.size or (1024, 1024)
    table = Table("level", "phase", "GiB", "of which")
    for name in LEVELS:
        needs = predict_memory(name, width, height, chosen.text_tokens)
        most = max(needs, key=lambda need: need.total)
        for need in needs:
            parts = ", ".join(
                f"{part} {size / GIB:.1f}" for part, size in need.parts.items() if size
            )
            peak = " (peak)" if need is most else ""
            table.add_row(name, need.phase, f"{need.total / GIB:.1f}{peak}", parts)
    Console().print(table)


def _of_method(name: str) -> list[str]:
    """Of a method all that it needs beside a base; another name as it is."""
    from openpulid.pipelines.presets import BASELINES, sdxl, with_method

    if name not in BASELINES:
        return [name]
    chosen = with_method(sdxl(), name)
    return [place for place in chosen.published if place != chosen.pipeline]


def _needed(names: list[str]) -> list[str]:
    """Names of weights, a preset's standing for all of its own; each once."""
    from openpulid.io.hub import WEIGHTS, find_weight
    from openpulid.pipelines.presets import PRESETS

    found: dict[str, None] = {}
    for name in names:
        if name in PRESETS:
            found |= dict.fromkeys(PRESETS[name]().published)
            continue
        try:
            find_weight(name)
        except OptionError:
            known = f"a preset ({', '.join(PRESETS)}) nor one of {', '.join(WEIGHTS)}"
            raise OptionError(
                f"{name!r} is neither {known}, nor OWNER/NAME of a pipeline of the hub."
            ) from None
        found[name] = None
    return list(found)
