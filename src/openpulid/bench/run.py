"""Run a benchmark: generate the images, compute the metrics, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from openpulid.bench.generate import Progress, Worker, generate_run, local_executor
from openpulid.bench.methods import Presets, load_studios
from openpulid.bench.ray_backend import ray_executor
from openpulid.bench.report import write_report
from openpulid.bench.run_dir import RunDir, Subject
from openpulid.bench.score import Scorers, score_run
from openpulid.bench.suite import Suite
from openpulid.bench.table import ResultTable


def run_benchmark(
    suite: Suite,
    presets: Presets,
    subjects: Sequence[Subject],
    scorers: Scorers,
    path: Path,
    *,
    workers: str | None = None,
    device: str | None = None,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Generate all missing images, compute their metrics and write the report.

    Args:
        suite: the suite.
        presets: label -> preset of each method, as `select_presets` returns them.
        subjects: the subjects.
        scorers: the metric models.
        path: run directory.
        workers: number of processes, or ray://HOST:PORT; None runs in this process.
        device: device name, or None for the best one.
        on_progress: called after each job.

    Returns:
        The files of the report.

    Raises:
        OptionError: another process uses the directory, or it cannot be written.
    """
    run_dir = RunDir(path.resolve() if workers else path)
    start = datetime.now(timezone.utc).isoformat()

    def build_worker() -> Worker:
        return Worker(suite, load_studios(suite, presets, device), subjects, run_dir, start)

    with run_dir.lock():
        executor = (
            ray_executor(build_worker, workers) if workers else local_executor(build_worker())
        )
        generate_run(suite, presets, subjects, run_dir, executor, on_progress)
        score_run(run_dir, scorers)
        return write_report(run_dir.load())


def update_report(
    path: Path, scorers: Scorers | None, *, write_files: bool = True
) -> tuple[dict[str, Any], list[Path]]:
    """Compute the metrics that a run lacks and write its report.

    Args:
        path: run directory.
        scorers: the metric models; None to compute no further metrics.
        write_files: write the report; otherwise only return its table.

    Returns:
        The table as JSON data, and the files of the report.
    """
    run_dir = RunDir(path)
    if scorers is not None:
        score_run(run_dir, scorers)
    run = run_dir.load()
    files = write_report(run) if write_files else []
    return ResultTable(run).to_json(), files
