"""The commands `pulid weights`: list, download and verify published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openpulid.cli.options import command_group, print_table
from openpulid.errors import OptionError, WeightsError, suggest

weights = command_group("List, download and verify published weights. Only `get` uses the network.")

Names = Annotated[
    list[str],
    typer.Argument(
        help="Presets (sdxl ...), methods, names from `pulid weights list`, or OWNER/NAME."
    ),
]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--folder", help="Directory of the weights; PULID_WEIGHTS and the hub's cache by default."
    ),
]


WEIGHT_COLUMNS = ("name", "file", "MB", "license", "sha256", "installed")


@weights.command("list")
def list_weights(folder: Directory = None) -> None:
    """List all published weights, their licenses, and where they are installed."""
    from openpulid.io.hub import WEIGHTS

    print_table(WEIGHT_COLUMNS, [describe_weight(name, folder) for name in WEIGHTS])


def describe_weight(name: str, folder: Path | None = None) -> tuple[str, ...]:
    """Describe a published weight, a cell for each of `WEIGHT_COLUMNS`."""
    from openpulid.io.hub import SHA256, find_weight, locate

    entry = find_weight(name)
    try:
        path = str(locate(name, folder))
    except WeightsError:
        path = "-"
    license_name = entry.license if entry.commercial else f"{entry.license} (not commercial)"
    checksum = SHA256.get(name, "-")[:12]
    return (name, entry.name, str(entry.megabytes), license_name, checksum, path)


@weights.command()
def get(names: Names, folder: Directory = None) -> None:
    """Download missing weights; an interrupted download from the hub is resumed."""
    from openpulid.io.hub import download

    for name in expand_names(names):
        print(download(name, folder))


@weights.command()
def verify(names: Names, folder: Directory = None) -> None:
    """Check weights against their known hashes, or those the hub reported at the download."""
    from openpulid.io.hub import verify_weights

    for name in expand_names(names):
        print(f"{name}: {verify_weights(name, folder)}")


def expand_names(names: list[str]) -> list[str]:
    """Replace presets and methods by the weights they need; each name once.

    Raises:
        OptionError: a name is unknown.
    """
    from openpulid.io.hub import WEIGHTS, find_weight
    from openpulid.pipelines.baselines import BASELINES
    from openpulid.pipelines.presets import PRESETS

    expanded: dict[str, None] = {}
    for name in names:
        if name in PRESETS:
            expanded |= dict.fromkeys(PRESETS[name]().published)
        elif name in BASELINES:
            expanded |= dict.fromkeys(method_weights(name))
        else:
            try:
                find_weight(name)
            except OptionError:
                similar = suggest(name, (*PRESETS, *BASELINES, *WEIGHTS))
                raise OptionError(
                    f"{name!r}{similar} is neither a preset ({', '.join(PRESETS)}), nor one of "
                    f"{', '.join(WEIGHTS)}, nor OWNER/NAME of a pipeline of the hub."
                ) from None
            expanded[name] = None
    return list(expanded)


def method_weights(method: str) -> list[str]:
    """Return the weights that a method needs, without the base model."""
    from openpulid.pipelines.baselines import BASELINES
    from openpulid.pipelines.presets import find_preset
    from openpulid.pipelines.selection import with_method

    preset = with_method(find_preset(BASELINES[method].family), method)
    return [source for source in preset.published if source != preset.models.pipeline]
