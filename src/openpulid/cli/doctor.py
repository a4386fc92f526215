"""The command `pulid doctor`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from openpulid.cli.options import print_json, print_table
from openpulid.errors import PulidError, escape_unprintable


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check this installation: packages, devices, presets, disk space, and the miniature.

    Nothing is downloaded. The exit code is 0 if the miniature works and nothing is in conflict.
    """
    from openpulid.doctor.report import examine

    with redirect_stdout(sys.stderr):  # some packages print while they are imported
        report = examine()
    if as_json:
        print_json(report.to_json())
    else:
        for section in report.sections.values():
            if section.rows:
                print_table(section.columns, section.rows)
                print()
        for kind, sentences in (("note", report.notes), ("problem", report.problems)):
            for sentence in sentences:
                print(escape_unprintable(f"{kind}: {sentence}"))
        if not report.problems:
            print("No problems: the miniature works, and nothing is in conflict.")
    if report.problems:
        raise typer.Exit(PulidError.exit_code)
