"""The commands about published weights and presets: what there is, what is here, what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openpulid.apps.common import group
from openpulid.errors import OptionError, WeightsError

weights = group("Published weights: list, get, verify. Only `get` asks a network.")

Name = Annotated[list[str], typer.Argument(help="Presets (sdxl, sdxl-v1 ...) or names from `pulid weights list`.")]
Where = Annotated[Path | None, typer.Option("--folder", help="Where they lie; PULID_WEIGHTS and the hub's cache by default.")]


@weights.command("list")
def list_weights(folder: Where = None) -> None:
    """All published weights that openpulid can use, their licences, and where they lie on this machine."""
    from rich.console import Console
    from rich.table import Table

    from openpulid.published import WEIGHTS, locate

    table = Table("name", "file", "MB", "licence", "here")
    for name, entry in WEIGHTS.items():
        try:
            here = str(locate(name, folder))
        except WeightsError:
            here = "-"
        licence = entry.licence if entry.commercial else f"{entry.licence} (not commercial)"
        table.add_row(name, entry.name, str(entry.megabytes), licence, here)
    Console().print(table)


@weights.command()
def get(names: Name, folder: Where = None) -> None:
    """Download what is missing; what was cut off goes on where it was."""
    from openpulid.published import get as download

    for name in _needed(names):
        print(download(name, folder))


@weights.command()
def verify(names: Name, folder: Where = None) -> None:
    """Read weights from end to end and compare them with what the hub says of them."""
    from openpulid.published import verify as check

    for name in _needed(names):
        print(f"{name}: {check(name, folder)}")


def _needed(names: list[str]) -> list[str]:
    """Names of weights, a preset's standing for all of its own; each once."""
    from openpulid.presets import PRESETS
    from openpulid.published import WEIGHTS

    found: dict[str, None] = {}
    for name in names:
        # a preset comes first: "sdxl" is more than its base
        if name in PRESETS:
            found |= dict.fromkeys(PRESETS[name]().published)
        elif name in WEIGHTS:
            found[name] = None
        else:
            raise OptionError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor one of {', '.join(WEIGHTS)}.")
    return list(found)
