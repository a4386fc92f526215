"""The published files that `pulid bench run` needs, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from openpulid.cli.options import print_table
from openpulid.cli.weights import WEIGHT_COLUMNS, describe_weight

if TYPE_CHECKING:
    from openpulid.bench.methods import Presets
    from openpulid.bench.plan import NeededFile
    from openpulid.bench.suite import Suite


def print_plan(suite: Suite, names: Sequence[str]) -> None:
    """Print the published files of a run, and the command that downloads the missing ones.

    Methods that the preset does not support are left out, with their reason.

    Args:
        suite: the suite, whose preset all methods use.
        names: methods in the form `METHOD[:FILE][@SCALE]`.

    Raises:
        OptionError: there is no method of a name.
        WeightsError: the miniature's own files are missing.
    """
    from openpulid.bench.methods import check_weights
    from openpulid.bench.plan import list_needed_files, select_available

    presets, problems = select_available(suite, names)
    files = list_needed_files(suite, presets)
    if files:
        _print_files(files)
    for problem in problems:
        print(f"Left out: {problem}")
    missing = [file for file in files if not file.is_installed]
    if missing:
        _print_downloads(missing)
    else:
        check_weights(presets)
        print("No published file is missing.")


def print_missing_files(suite: Suite, presets: Presets) -> None:
    """Print the published files of a run if one of them is missing without which it cannot start.

    Args:
        suite: the suite.
        presets: label -> preset of each method.
    """
    from openpulid.bench.plan import list_needed_files

    files = list_needed_files(suite, presets)
    if any(not file.is_installed and not file.is_optional for file in files):
        _print_files(files)


def _print_files(files: Sequence[NeededFile]) -> None:
    rows = [(*describe_weight(file.name), ", ".join(file.users)) for file in files]
    print_table((*WEIGHT_COLUMNS, "needed by"), rows)


def _print_downloads(missing: Sequence[NeededFile]) -> None:
    """Print how to get the missing files."""
    from openpulid.bench.plan import METRICS
    from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS

    downloads = [file.name for file in missing if not WEIGHTS[file.name].is_manual]
    if downloads:
        megabytes = sum(WEIGHTS[name].megabytes or 0 for name in downloads)
        print(f"Missing files (about {megabytes} MB): `pulid weights get {' '.join(downloads)}`")
    for file in missing:
        entry = WEIGHTS[file.name]
        if entry.is_manual:
            advice = ", or use --recognition sface" if METRICS in file.users else ""
            print(
                f"{file.name} cannot be downloaded automatically: get {entry.file} from "
                f"{entry.repo}, put it into a folder and set {FOLDER_VARIABLE} to that "
                f"folder{advice}."
            )
