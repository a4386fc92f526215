"""Progress bar, log lines, history.json, loss curves, sample sheets and TensorBoard of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
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

from openpulid.training.checkpointing import write_text

LINE_SECONDS = 30.0  # between log lines without a terminal


class TrainingLogger:
    """Writes history.json, losses.png, sheet-STEP.png and tensorboard/ of one run directory.

    history.json is a list of records: {"step", "seconds", "lr", "steps_per_second", "losses":
    {...}} and {"step", "seconds", "metrics": {...}}. Seconds are training time over all
    resumptions.

    Args:
        folder: the run directory.
        step: number of finished steps.
        total: planned number of steps.
        silent: write and print nothing; for every rank but the first.
    """

    def __init__(self, folder: Path, step: int, total: int, *, silent: bool = False) -> None:
        self.folder = folder
        self.silent = silent
        self.history: list[dict[str, Any]] = self._read_history(step)
        self.console = Console(quiet=silent, stderr=True)
        self._line_at = 0.0
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
        self._board = None if silent else _open_tensorboard(folder / "tensorboard", step)

    def __enter__(self) -> TrainingLogger:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._board:
            self._board.close()

    def log_losses(
        self, step: int, total: int, seconds: float, losses: Mapping[str, float], **more: float
    ) -> None:
        """Log the mean losses since the last call; `more` are further numbers of the run."""
        record = {"step": step, "seconds": round(seconds, 2), **more, "losses": dict(losses)}
        self.history.append(record)
        self._log_scalars("loss", step, losses)
        self._log_scalars("run", step, more)
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
        self._log_scalars("validation", step, metrics)
        if metrics:
            self.print(f"{self.folder.name}  step {step}  {_format_values(metrics)}")
        if sheet is not None:
            sheet.save(self.folder / f"sheet-{step:07d}.png")
        self.write()

    def write(self) -> None:
        """Write history.json and losses.png."""
        if not self.silent:
            lines = ",\n".join(json.dumps(record) for record in self.history)
            write_text(self.folder / "history.json", f"[\n{lines}\n]\n")
            draw_curves(self.history, self.folder / "losses.png")

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _log_scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def _read_history(self, step: int) -> list[dict[str, Any]]:
        """Read the history up to `step`; a resumed run repeats what follows its last checkpoint."""
        file = self.folder / "history.json"
        if not step or not file.exists():
            return []
        return [record for record in json.loads(file.read_text()) if record["step"] <= step]


def _format_values(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _open_tensorboard(folder: Path, step: int) -> Any:
    """Open a TensorBoard writer; None without the package (extra "train")."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step)


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
        for group in ("losses", "metrics"):
            for name, value in record.get(group, {}).items():
                steps, values = curves.setdefault(
                    name if group == "losses" else f"validation {name}", ([], [])
                )
                steps.append(record["step"])
                values.append(value)
    if not curves:
        return
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    for axes, (name, (steps, values)) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, curves.items(), strict=False
    ):
        axes.plot(steps, values, linewidth=1, marker="." if len(steps) < 30 else "")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
