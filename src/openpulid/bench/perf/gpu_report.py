"""File of the GPU report: parts and their rows, saved after every change, and its Markdown page.

Imports only the standard library: the process that supervises a report does not load PyTorch.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

JSON_NAME = "gpu-report.json"
PAGE_NAME = "gpu-report.md"
MAX_MESSAGE = 400
"""Characters of an error message in the report."""
MAX_TRACEBACK = 2500
"""Characters of a traceback in the report."""

ABSOLUTE_PATH = re.compile(
    r"(?:(?<![\w./:~-])|(?<=-[IL]))"  # not in a URL or relative path, but in a compiler's option
    r"/(?:[\w.@+-]+/)+(?=[\w.@+-])"
)
"""Directories of an absolute path."""

Row = Mapping[str, Any]

UNITS = {
    "ms": "median milliseconds of a step (one call of the network, or a guided pair of calls)",
    "s": "median seconds of a training step, without reading data",
    "ratio": "time of the step relative to the first candidate, median of the ratios of the rounds",
    "within": "whole step relative to the same step without the time, by CUDA events, that adding "
    "the identity takes",
    "peak_gib": "peak GPU memory allocated by tensors during the step, including weights, in GiB",
    "reserved_gib": "peak GPU memory reserved by PyTorch, in GiB",
    "images_per_s": "training images per second",
    "first_s": "seconds of the first call, including loading or compilation",
    "placing_s": "seconds until the memory level is applied to the pipeline",
    "output_change": "norm of the change by the identity relative to the norm of the output",
    "compile_s": "seconds of the first calls, including compilation",
    "k": "steps of the rollout that carry gradients",
}


class OutOfTime(Exception):
    """The time of the part, or of the report, is over."""


class DeviceLost(Exception):
    """The accelerator rejects every call after an error, so this process cannot continue."""


class PartSkipped(Exception):
    """A part cannot run on this machine; the message is the reason."""


@dataclass
class PartRecord:
    """One part of the report.

    Attributes:
        name: short name, as in `--parts`.
        title: heading on the page.
        cap_s: the part is stopped after this number of seconds.
        needs_s: the part is skipped if less time than this is left.
        status: pending, running, done, failed, skipped or stopped.
        reason: why the part is not done.
        started: start as `time.time()`; 0 if the part has not started.
        seconds: duration.
        settings: what was measured, in words.
        reference: published figures or targets to compare with.
        rows: figures, and errors of the rows that failed.
    """

    name: str
    title: str
    cap_s: float
    needs_s: float
    status: str = "pending"
    reason: str = ""
    started: float = 0.0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Report:
    """All parts of a report, stored as `gpu-report.json` in a directory.

    Attributes:
        directory: where the report is stored.
        command: command that writes the report, without machine paths.
        date: start in UTC, in ISO format.
        revision: git revision of the source.
        budget_s: seconds for the whole report.
        tiny: whether networks are tiny, to test the script.
        seed: random seed of each part.
        started: start as `time.time()`, from which the budget counts.
        machine: hardware and library versions.
        parts: in the order in which they run.
    """

    directory: Path
    command: list[str]
    date: str
    revision: str
    budget_s: float
    tiny: bool
    seed: int
    started: float
    machine: dict[str, Any] = field(default_factory=dict)
    parts: list[PartRecord] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> Report:
        """Read the report of a directory."""
        fields = json.loads((directory / JSON_NAME).read_text("utf-8"))
        fields.pop("units")
        parts = [PartRecord(**part) for part in fields.pop("parts")]
        return cls(directory=directory, parts=parts, **fields)

    def save(self) -> None:
        """Write the file atomically, because another process reads it meanwhile."""
        fields = asdict(self)
        del fields["directory"]
        fields["units"] = UNITS
        fields["parts"] = fields.pop("parts")  # last in the file
        path = self.directory / JSON_NAME
        temporary_path = path.with_name(f".{path.name}.{os.getpid()}")
        temporary_path.write_text(json.dumps(fields, indent=1) + "\n", "utf-8")
        os.replace(temporary_path, path)

    def write_page(self) -> None:
        """Write the report as Markdown next to its file."""
        (self.directory / PAGE_NAME).write_text(render_page(self), "utf-8")

    def time_left(self) -> float:
        """Return the remaining seconds of the budget."""
        return self.started + self.budget_s - time.time()

    def with_status(self, status: str) -> list[PartRecord]:
        """Return the parts with a status."""
        return [part for part in self.parts if part.status == status]

    def finish(self, part: PartRecord, status: str, reason: str = "") -> None:
        """Set the final status of a part and save the report."""
        part.status = status
        part.reason = reason
        if part.started:
            part.seconds = round(time.time() - part.started, 1)
        self.save()


class Recorder:
    """Records the rows of a part: saves each one, also errors, and stops when time runs out.

    Args:
        report: the report of the part.
        part: the part that is measured.
        release: frees the device memory of the previous row.
    """

    def __init__(
        self, report: Report, part: PartRecord, release: Callable[[], None] = lambda: None
    ) -> None:
        self.report = report
        self.part = part
        self.release = release

    def time_left(self) -> float:
        """Return the seconds until the part must end."""
        return min(self.part.started + self.part.cap_s - time.time(), self.report.time_left())

    def attempt(
        self, name: str, measure: Callable[[], Row | Iterable[Row]], needs_s: float = 0.0
    ) -> bool:
        """Record the rows of a measurement, or its error.

        Args:
            name: label of the rows.
            measure: returns one row or several.
            needs_s: expected seconds; the measurement does not start with less time left.

        Returns:
            Whether the measurement succeeded.

        Raises:
            OutOfTime: less time is left than the measurement needs.
            DeviceLost: the device does not work any more.
        """
        if self.time_left() < max(needs_s, 0.001):
            self.part.rows.append({"row": name, "error": "skipped: no time left"})
            self.report.save()
            raise OutOfTime
        start = time.time()
        rows: list[Row] | None = None
        is_lost = False
        try:
            result = measure()
            rows = [result] if isinstance(result, Mapping) else list(result)
        except Exception as error:
            self.record_error(name, error)
            is_lost = is_device_lost(error)
        if is_lost:
            raise DeviceLost
        if rows is None:
            # not in the except block: an error that is being handled keeps its frames' tensors
            self.release()
            return False
        for row in rows:
            self.part.rows.append({"row": name, **row})
            log(f"  {name}: {', '.join(f'{key} {value}' for key, value in row.items())}")
        self.part.rows[-1]["took_s"] = round(time.time() - start, 1)
        self.report.save()
        self.release()
        return True

    def record_error(self, name: str, error: Exception) -> str:
        """Add a row with an error and its traceback, without machine paths; return the message."""
        message = describe_error(error)
        where = strip_paths("".join(traceback.format_exception(error, limit=-6)))
        if len(where) > MAX_TRACEBACK:
            where = where[-MAX_TRACEBACK:].partition("\n")[2]  # begin with a whole line
        self.part.rows.append({"row": name, "error": message, "where": where})
        log(f"  {name} failed: {message}\n{where}")
        self.report.save()
        return message


def is_device_lost(error: BaseException) -> bool:
    """Return whether a CUDA error leaves the process without a usable device."""
    message = str(error)
    return "CUDA error" in message and "out of memory" not in message


def describe_error(error: BaseException) -> str:
    """Return type and message of an error on one line, shortened and without machine paths."""
    message = " ".join(strip_paths(str(error)).split())
    return f"{type(error).__name__}: {message[:MAX_MESSAGE]}"


def strip_paths(text: str) -> str:
    """Remove machine paths from a message or traceback.

    Paths in a directory of `sys.path` become relative to it, for example
    "openpulid/bench/perf/gpu.py". Other absolute paths are reduced to the name of the file.
    """
    package_root = Path(__file__).parents[3]
    directories = {str(directory) for directory in (package_root, *sys.path, Path.home())}
    for directory in sorted(directories, key=len, reverse=True):
        if directory.startswith("/") and directory != "/":
            text = text.replace(f"{directory}/", "")
    return ABSOLUTE_PATH.sub("", text)


def log(text: str) -> None:
    """Print a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


# -- the page --


def render_page(report: Report) -> str:
    """Render the report as Markdown, with one table for each part."""
    machine = report.machine
    revision = report.revision or "unknown"
    note = ", tiny networks: a test of the script, not a measurement" if report.tiny else ""
    lines = [
        "# GPU report",
        "",
        f"{machine.get('device', 'unknown device')}, {report.date}, revision `{revision}`. "
        f"Random weights{note}.",
        "",
        f"Command: `{' '.join(report.command)}`, budget {report.budget_s:.0f} s.",
        "",
        ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device"),
        "",
    ]
    for part in report.parts:
        lines += _render_part(part)
    lines += ["## Units", ""]
    lines += [f"- `{name}`: {meaning}" for name, meaning in UNITS.items()]
    return "\n".join(lines) + "\n"


def _render_part(part: PartRecord) -> list[str]:
    status = part.status if part.status == "done" else f"**{part.status}**: {part.reason}"
    lines = [f"## {part.title}", "", f"{status} ({part.seconds:.0f} s)", ""]
    lines += [f"- {name}: {value}" for name, value in part.settings.items()]
    lines += [f"- reference, {name}: {value}" for name, value in part.reference.items()]
    if part.settings or part.reference:
        lines.append("")
    return [*lines, *_render_table(part.rows), ""]


def _render_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["No rows."]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in columns if name != "where"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_render_value(row.get(name)) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _render_value(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|")
