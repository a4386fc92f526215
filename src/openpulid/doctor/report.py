"""Run every check of an installation on its own, and collect what they find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from openpulid.errors import first_line

CHECKS = ("packages", "devices", "providers", "presets", "storage", "miniature")
"""Modules of this package, each with a function `check`.

They are imported one by one: a package that is missing or broken ends one check, not all of them.
"""


@dataclass(frozen=True)
class Section:
    """What one check has found.

    Attributes:
        columns: titles of the table.
        rows: cells of the table.
        problems: sentences about what does not work, each with the fix.
        notes: sentences about what works, but could be better.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The sections of all checks, by their names."""

    sections: dict[str, Section]

    @property
    def problems(self) -> list[str]:
        """The problems of all sections."""
        return [text for section in self.sections.values() for text in section.problems]

    @property
    def notes(self) -> list[str]:
        """The notes of all sections."""
        return [text for section in self.sections.values() for text in section.notes]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data: each table as a list of rows."""
        tables = {
            name: [dict(zip(section.columns, row, strict=True)) for row in section.rows]
            for name, section in self.sections.items()
        }
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "notes": self.notes,
            **tables,
        }


def examine(names: Sequence[str] = CHECKS) -> Report:
    """Run checks. Nothing is downloaded, and no check ends the others.

    Args:
        names: of the checks.
    """
    return Report({name: run_check(name) for name in names})


def run_check(name: str) -> Section:
    """Run one check; if it fails, that is the problem it reports."""
    try:
        section: Section = import_module(f"openpulid.doctor.{name}").check()
    # A broken package can raise anything when it is imported.
    except Exception as error:
        return Section(problems=(f"{name} cannot be checked: {describe_error(error)}",))
    return section


def describe_error(error: BaseException) -> str:
    """Return the first line of an error's message, as a sentence."""
    return first_line(error) + "."
