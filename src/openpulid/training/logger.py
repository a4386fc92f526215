"""What a person sees of a training run: progress bar or log lines, history.json, loss curves, sheets,
TensorBoard."""

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

LINE_EVERY = 30.0  # seconds between log lines where there is no terminal


class TrainingLogger:
    """One run folder's history.json, losses.png, sheet-STEP.png and tensorboard/; silent on every rank but
    the first.

    history.json is a list of records: {"step", "seconds", "lr", "samples_per_second", "losses": {...}} and
    {"step", "seconds", "metrics": {...}}; seconds are those of training, over all resumptions.
    """

    def __init__(self, folder: Path, step: int, total: int, *, silent: bool = False) -> None:
        self.folder, self.silent = folder, silent
        self.history: list[dict[str, Any]] = self._read(step)
        self.console = Console(quiet=silent, stderr=True)
        self._line_at = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self.console, disable=silent or not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(folder.name, total=total, completed=step)
        self._board = None if silent else _tensorboard(folder / "tensorboard", step)

    def __enter__(self) -> TrainingLogger:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._board:
            self._board.close()

    def losses(
        self, step: int, total: int, seconds: float, losses: Mapping[str, float], **more: float
    ) -> None:
        """The mean losses since the last call."""
        self.history.append(
            {"step": step, "seconds": round(seconds, 2), **more, "losses": dict(losses)}
        )
        self._scalars("loss", step, losses)
        self._scalars("run", step, more)
        words = "  ".join(f"{k} {v:.4g}" for k, v in losses.items())
        text = f"{self.folder.name}  {words}  {more.get('samples_per_second', 0):.0f}/s"
        self._bar.update(self._task, completed=step, total=total, description=text)
        if not self._bar.disable or time.monotonic() - self._line_at < LINE_EVERY:
            return
        self._line_at = time.monotonic()
        self.say(f"{text}  step {step}/{total}  {seconds / 60:.1f} min")

    def metrics(
        self, step: int, seconds: float, metrics: Mapping[str, float], sheet: Image.Image | None
    ) -> None:
        """What a validation gave."""
        if self.silent:
            return
        self.history.append({"step": step, "seconds": round(seconds, 2), "metrics": dict(metrics)})
        self._scalars("validation", step, metrics)
        if metrics:
            self.say(
                f"{self.folder.name}  step {step}  "
                + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            )
        if sheet is not None:
            sheet.save(self.folder / f"sheet-{step:07d}.png")
        self.write()

    def write(self) -> None:
        """history.json and losses.png."""
        if not self.silent:
            lines = ",\n".join(json.dumps(record) for record in self.history)
            write_text(self.folder / "history.json", f"[\n{lines}\n]\n")
            draw_curves(self.history, self.folder / "losses.png")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def _read(self, step: int) -> list[dict[str, Any]]:
        """The history up to `step`: what a killed run wrote after its last checkpoint will be made again."""
        file = self.folder / "history.json"
        return (
            [r for r in json.loads(file.read_text()) if r["step"] <= step]
            if step and file.exists()
            else []
        )


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer, or None where tensorboard is not installed (it belongs to the extra "train")."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step)


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """One panel per loss and per metric over the steps; nothing where matplotlib is not installed (extra
    "train")."""
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
