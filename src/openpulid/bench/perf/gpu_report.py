"""The GPU report's file: parts and their rows, saved after every change, and the page that shows them.

Needs the standard library alone: the process that watches over a report imports nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

JSON_NAME = "gpu-report.json"
PAGE_NAME = "gpu-report.md"

Row = Mapping[str, Any]

UNITS = {
    "ms": "median milliseconds of one step (one call of the network, or a guided pair of calls)",
    "s": "median seconds of one training step, everything included but reading data",
    "ratio": "median over the rounds of the step's time to the first candidate's of the same round",
    "within": "whole step to the same step without the time (by CUDA events) of adding the identity",
    "peak_gib": "most GPU memory allocated by tensors during the step, weights included, GiB",
    "reserved_gib": "most GPU memory that PyTorch reserved, GiB",
    "images_per_s": "training images per second",
    "first_s": "seconds of the first call, loading or compiling included",
    "placing_s": "seconds until the parts are where the level wants them",
    "output_change": "norm of what the identity changes in the output over the output's norm",
    "compile_s": "seconds of the first call, compilation included",
    "k": "steps of the rollout through which gradients go",
}


class OutOfTime(Exception):
    """The part's time, or the report's, is over."""


class DeviceLost(Exception):
    """The accelerator refuses everything after an error: this process cannot go on."""


@dataclass
class PartRecord:
    """One part of the report.

    Attributes:
        cap_s: it is stopped after so many seconds.
        needs_s: it is not begun with less time left.
        status: pending, running, done, failed, skipped or stopped.
        reason: why it is not done.
        reference: published figures or targets to compare with.
    """

    name: str
    title: str
    cap_s: float
    needs_s: float
    status: str = "pending"
    reason: str = ""
    begun: float = 0.0  # of time.time()
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Report:
    """Everything that is measured, in the file `gpu-report.json` of a directory.

    Attributes:
        begun: of time.time(); the budget counts from here.
        machine: what computes, and the versions of what it runs.
    """

    directory: Path
    command: list[str]
    date: str
    revision: str
    budget_s: float
    tiny: bool
    seed: int
    begun: float
    machine: dict[str, Any] = field(default_factory=dict)
    parts: list[PartRecord] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> Report:
        known = json.loads((directory / JSON_NAME).read_text("utf-8"))
        known.pop("units")
        parts = [PartRecord(**part) for part in known.pop("parts")]
        return cls(directory=directory, parts=parts, **known)

    def save(self) -> None:
        """Write the file in one move: whoever reads it finds a whole one."""
        facts = asdict(self)
        facts.pop("directory")
        facts["units"] = UNITS
        facts["parts"] = facts.pop("parts")
        path = self.directory / JSON_NAME
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        os.replace(unfinished, path)

    def write_page(self) -> None:
        (self.directory / PAGE_NAME).write_text(page(self), "utf-8")

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.begun + self.budget_s - time.time()

    def with_status(self, *names: str) -> list[PartRecord]:
        return [part for part in self.parts if part.status in names]


class Recorder:
    """What a part measures with: rows are saved as they come, errors too, and time runs out between rows.

    Args:
        release: frees what the last row left on the device.
    """

    def __init__(
        self, report: Report, part: PartRecord, release: Callable[[], None] = lambda: None
    ) -> None:
        self.report, self.part, self.release = report, part, release

    def left(self) -> float:
        """Seconds until the part must be over."""
        return min(self.part.begun + self.part.cap_s - time.time(), self.report.left())

    def attempt(
        self, name: str, measure: Callable[[], Row | Iterable[Row]], needs_s: float = 0.0
    ) -> bool:
        """Record the rows of one measurement, or why there are none.

        Returns:
            Whether it was measured.

        Raises:
            OutOfTime: less time is left than the measurement needs.
            DeviceLost: the device does not answer any more.
        """
        if self.left() < max(needs_s, 0.001):
            self.part.rows.append({"row": name, "error": "skipped: no time left"})
            self.report.save()
            raise OutOfTime
        begun = time.time()
        rows: list[Row] | None = None
        lost = False
        try:
            measured = measure()
            rows = [measured] if isinstance(measured, Mapping) else list(measured)
        except Exception as error:
            self.failed(name, error)
            lost = is_device_lost(error)
        if lost:
            raise DeviceLost
        if rows is None:
            self.release()  # not before: an error that is being handled keeps its frames' tensors
            return False
        for row in rows:
            self.part.rows.append({"row": name, **row})
            say(f"  {name}: {text_of(row)}")
        self.part.rows[-1]["took_s"] = round(time.time() - begun, 1)
        self.report.save()
        self.release()
        return True

    def failed(self, name: str, error: Exception) -> None:
        where = traceback.format_exc(limit=-6)
        message = f"{type(error).__name__}: {first_lines(str(error))}"
        self.part.rows.append({"row": name, "error": message, "where": where[-2500:]})
        say(f"  {name} failed: {message}\n{where}")
        self.report.save()


def is_device_lost(error: BaseException) -> bool:
    """Whether an error of CUDA's leaves the process without a usable device."""
    message = str(error)
    return "CUDA error" in message and "out of memory" not in message


def first_lines(message: str, most: int = 400) -> str:
    return " ".join(message.split())[:most]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def text_of(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


# -- the page --


def page(report: Report) -> str:
    """The report as Markdown: one table for each part."""
    machine = report.machine
    lines = [
        "# GPU report",
        "",
        f"{machine.get('device', 'unknown device')}, {report.date}, revision "
        f"`{report.revision or 'unknown'}`. Random weights"
        + (", tiny networks: a test of the script, no measurement." if report.tiny else "."),
        "",
        f"Command: `{' '.join(report.command)}`, budget {report.budget_s:.0f} s.",
        "",
        ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device"),
        "",
    ]
    for part in report.parts:
        lines += _section(part)
    lines += ["## Units", ""]
    lines += [f"- `{name}`: {meaning}" for name, meaning in UNITS.items()]
    return "\n".join(lines) + "\n"


def _section(part: PartRecord) -> list[str]:
    state = part.status if part.status == "done" else f"**{part.status}**: {part.reason}"
    lines = [f"## {part.title}", "", f"{state} ({part.seconds:.0f} s)", ""]
    lines += [f"- {name}: {value}" for name, value in part.settings.items()]
    lines += [f"- reference, {name}: {value}" for name, value in part.reference.items()]
    if part.settings or part.reference:
        lines.append("")
    return lines + _table(part.rows) + [""]


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in columns if name != "where"]
    if not rows:
        return ["No rows."]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_cell(row.get(name)) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|")
