"""Progress bar, log lines, history.json, loss curves, sample sheets and TensorBoard of a run."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from openpulid.errors import TrainingError
from openpulid.io.metadata import encode_image
from openpulid.training.checkpointing import write_bytes, write_text

LINE_SECONDS = 30.0  # between log lines without a terminal
CURVE_SECONDS = 60.0  # between two drawings of losses.png, which take a second each


class RunConsole(Console):
    """A console on stderr whose failures do not end a run."""

    def on_broken_pipe(self) -> None:
        """Print nothing more, instead of exiting, when nobody reads stderr any longer."""
        self.quiet = True


class TrainingLogger:
    """Writes history.json, losses.png, sheet-STEP.png and tensorboard/ of one run directory.

    A file that cannot be written, for example on a full disk, is reported and written the next
    time; it never ends the run.

    history.json is a list of records: {"step", "seconds", "lr", "gradient_norm",
    "steps_per_second", "losses": {...}} and {"step", "seconds", "metrics": {...}}. Seconds are
    training time over all resumptions.

    Args:
        folder: the run directory.
        step: number of finished steps.
        total: planned number of steps.
        silent: write and print nothing; for every rank but the first.
    """

    def __init__(self, folder: Path, step: int, total: int, *, silent: bool = False) -> None:
        self.folder = folder
        self.silent = silent
        self.console = RunConsole(quiet=silent, stderr=True)
        self.history: list[dict[str, Any]] = self._read_history(step)
        self._line_at = 0.0
        self._curves_at = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=silent or not self.console.is_terminal,
        )
        self._task = self._bar.add_task(folder.name, total=total, completed=step)
        self._events = None if silent else _open_event_log(folder / "tensorboard", step)

    def __enter__(self) -> TrainingLogger:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._draw_curves()

    def log_losses(
        self, step: int, total: int, seconds: float, losses: Mapping[str, float], **more: float
    ) -> None:
        """Log the mean losses since the last call; `more` are further numbers of the run."""
        record = {"step": step, "seconds": round(seconds, 2), **more, "losses": dict(losses)}
        self.history.append(record)
        if self._events:
            self._events.add("loss", step, losses)
            self._events.add("run", step, more)
            with suppress(OSError):  # `write` reports it
                self._events.flush()
        summary = _format_values(losses)
        text = f"{self.folder.name}  {summary}  {more.get('steps_per_second', 0):.3g} steps/s"
        self._bar.update(self._task, completed=step, total=total, description=text)
        if not self._bar.disable or time.monotonic() - self._line_at < LINE_SECONDS:
            return
        self._line_at = time.monotonic()
        self.print(f"{text}  step {step}/{total}  {seconds / 60:.1f} min")

    def log_metrics(
        self, step: int, seconds: float, metrics: Mapping[str, float], sheet: Image.Image | None
    ) -> None:
        """Log the results of a validation."""
        if self.silent:
            return
        self.history.append({"step": step, "seconds": round(seconds, 2), "metrics": dict(metrics)})
        if self._events:
            self._events.add("validation", step, metrics)
        if metrics:
            self.print(f"{self.folder.name}  step {step}  {_format_values(metrics)}")
        self.write()
        if sheet is not None:
            with self._report_failure():
                write_bytes(self.folder / f"sheet-{step:07d}.png", encode_image(sheet))

    def write(self) -> None:
        """Write history.json, the events of TensorBoard, and now and then losses.png."""
        if self.silent:
            return
        with self._report_failure():
            lines = ",\n".join(json.dumps(_to_json(record)) for record in self.history)
            write_text(self.folder / "history.json", f"[\n{lines}\n]\n")
        if self._events:
            with self._report_failure():
                self._events.flush()
        if time.monotonic() - self._curves_at > CURVE_SECONDS:
            self._draw_curves()

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        with suppress(OSError):  # stderr can be a file on a full disk
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _draw_curves(self) -> None:
        self._curves_at = time.monotonic()
        if not self.silent:
            with self._report_failure():
                draw_curves(self.history, self.folder / "losses.png")

    @contextmanager
    def _report_failure(self) -> Iterator[None]:
        """Report a file that cannot be written."""
        try:
            yield
        except TrainingError as error:
            self.print(f"{error} Training continues.")
        except OSError as error:
            self.print(f"{self.folder}: a log could not be written ({error}). Training continues.")

    def _read_history(self, step: int) -> list[dict[str, Any]]:
        """Read the history up to `step`; a resumed run repeats what follows its last checkpoint.

        Records that cannot be read are left out, and the damaged file is kept under another name.
        """
        file = self.folder / "history.json"
        if not step or not file.exists():
            return []
        try:
            records = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            records = None
        if not isinstance(records, list):
            records = None
        valid = [_from_json(record) for record in records or () if _is_record(record)]
        if (records is None or len(valid) < len(records)) and not self.silent:
            copy = file.with_name("history.damaged.json")
            with suppress(OSError):
                file.replace(copy)
            self.print(
                f"{file} is damaged: it is now {copy.name}, and {len(valid)} records of it are "
                "continued. Training continues."
            )
        return [record for record in valid if record["step"] <= step]


GROUPS = ("losses", "metrics")


def _is_record(record: Any) -> bool:
    """Return whether a value is a record of `TrainingLogger`."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    groups = [record[name] for name in GROUPS if name in record]
    return bool(groups) and all(
        isinstance(group, dict)
        and all(value is None or type(value) in (int, float) for value in group.values())
        for group in groups
    )


def _to_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that JSON does not have by null."""
    return _replace_values(
        record, lambda value: value if value is None or math.isfinite(value) else None
    )


def _from_json(record: Mapping[str, Any]) -> dict[str, Any]:
    return _replace_values(record, lambda value: math.nan if value is None else value)


def _replace_values(record: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    converted = dict(record)
    for group in GROUPS:
        if group in record:
            converted[group] = {name: convert(value) for name, value in record[group].items()}
    return converted


def _format_values(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _open_event_log(folder: Path, step: int) -> Any:
    """Open a log for TensorBoard; None without the package (extra "train")."""
    try:
        from openpulid.training.event_log import EventLog
    except ImportError:
        return None
    return EventLog(folder, step)


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Plot every loss and metric over the steps; does nothing without matplotlib (extra "train").

    Args:
        history: records of `TrainingLogger`.
        path: the image to write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in history:
        for group in GROUPS:
            for name, value in record.get(group, {}).items():
                steps, values = curves.setdefault(
                    name if group == "losses" else f"validation {name}", ([], [])
                )
                if math.isfinite(value):
                    steps.append(record["step"])
                    values.append(value)
    if not curves:
        return
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    size = (4.5 * columns, 3 * rows)
    figure = Figure(figsize=size)
    # fixed margins in inches: a computed layout doubles the time of drawing
    figure.subplots_adjust(
        left=0.6 / size[0],
        right=1 - 0.2 / size[0],
        bottom=0.4 / size[1],
        top=1 - 0.4 / size[1],
        wspace=0.25,
        hspace=0.35,
    )
    for axes, (name, (steps, values)) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, curves.items(), strict=False
    ):
        axes.plot(steps, values, linewidth=1, marker="." if len(steps) < 30 else "")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, dpi=90)
    write_bytes(path, content.getvalue())
