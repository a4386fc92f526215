"""GPU report: cost of PuLID on one accelerator, at full size and with random weights.

    python -m openpulid.bench.perf.gpu -o DIR

The most important parts run first, in a worker process, and every row is saved immediately. A part
that fails, hangs or crashes its process loses only its own rows. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from openpulid.bench.perf.gpu_report import (
    DeviceLost,
    OutOfTime,
    PartRecord,
    PartSkipped,
    Recorder,
    Report,
    is_device_lost,
    log,
)

MODULE = "openpulid.bench.perf.gpu"
BUDGET = 460.0
"""Seconds for the whole report."""
SEED = 0
GRACE = 3.0
"""Seconds that a part may run over its end before its process is stopped."""
EXIT_DEVICE_LOST = 3
"""Exit code of a worker whose device does not work any more."""

Measure = Callable[[Recorder, Any], None]
"""Measures a part on a `gpu_machine.Machine`."""


def plan_parts() -> list[PartRecord]:
    """Return all parts, the most important first."""
    paper = {
        "paper, one A100, GB for k = 1..4": "41 / 49 / 56 / 63",
        "paper, one A100, s for k = 1..4": "2.6 / 2.9 / 3.1 / 3.3",
        "target": "k = 4 under 35 GB at no more than 1.2 times the time of plain k = 4",
    }
    step = {"target": "ratio of the step with an identity: 1.02 (SDXL), 1.005 (FLUX) at 1024 px"}
    return [
        PartRecord("sdxl", "SDXL: one step, eager", 75, 8, reference=step),
        PartRecord("flux", "FLUX: one step, eager", 75, 12, reference=step),
        PartRecord("train_sdxl", "sdxl_stage3: one training step", 90, 15, reference=paper),
        PartRecord("train_mini", "Miniature: training, eager", 45, 10),
        PartRecord("train_flux", "FLUX: one training step, stage 1", 45, 15),
        PartRecord("compiled_flux", "FLUX: one step, compiled blocks", 75, 25),
        PartRecord("flux_levels", "FLUX: memory levels", 110, 20),
        PartRecord("sdxl_levels", "SDXL: memory levels", 75, 20),
        PartRecord("compiled_mini", "Miniature: training, compiled", 90, 35),
        PartRecord("compiled_sdxl", "SDXL: one step, compiled", 200, 30),
    ]


def load_measures() -> Mapping[str, Measure]:
    """Import the functions that measure the parts, and with them torch and diffusers."""
    from openpulid.bench.perf import gpu_inference, gpu_memory, gpu_training

    return {
        "sdxl": gpu_inference.measure_sdxl,
        "flux": gpu_inference.measure_flux,
        "train_sdxl": gpu_training.measure_sdxl_stage3,
        "train_mini": gpu_training.measure_miniature,
        "train_flux": gpu_training.measure_flux_stage1,
        "compiled_flux": gpu_inference.compile_and_measure_flux,
        "flux_levels": gpu_memory.measure_flux_levels,
        "sdxl_levels": gpu_memory.measure_sdxl_levels,
        "compiled_mini": gpu_training.compile_and_measure_miniature,
        "compiled_sdxl": gpu_inference.compile_and_measure_sdxl,
    }


# -- the worker process --


def run_worker(
    directory: Path,
    measures: Mapping[str, Measure] | None = None,
    machine: Any = None,
) -> int:
    """Measure every pending part of a report.

    Args:
        directory: directory of the report.
        measures: functions that measure the parts, by name; by default `load_measures`.
        machine: a `gpu_machine.Machine`; by default the accelerator.

    Returns:
        The exit code.
    """
    report = Report.read(directory)
    measures = measures or load_measures()
    if machine is None:
        from openpulid.bench.perf.gpu_machine import Machine, describe_machine

        machine = Machine.detect(report.tiny)
        report.machine = describe_machine(machine)
        log(f"{report.machine['device']}, {report.time_left():.0f} s left")
    for part in report.with_status("pending"):
        if report.time_left() <= (0 if report.tiny else part.needs_s):
            report.finish(part, "skipped", "no time left")
        elif not _run_part(report, part, measures[part.name], machine):
            return EXIT_DEVICE_LOST
    return 0


def _run_part(report: Report, part: PartRecord, measure: Measure, machine: Any) -> bool:
    """Run one part; return whether the process can continue."""
    part.status = "running"
    part.started = time.time()
    report.save()
    log(f"{part.title} ({report.time_left():.0f} s left)")
    recorder = Recorder(report, part, machine.release)
    try:
        machine.set_seed(report.seed)
        measure(recorder, machine)
    except PartSkipped as skipped:
        report.finish(part, "skipped", str(skipped))
    except OutOfTime:
        report.finish(part, "stopped", "no time left for further rows")
    except DeviceLost:
        report.finish(part, "failed", "the device is lost, see the last row")
        return False
    except Exception as error:
        message = recorder.record_error("setup", error)
        report.finish(part, "failed", message)
        if is_device_lost(error):
            return False
    else:
        if all("error" in row for row in part.rows):
            report.finish(part, "failed", "no row could be measured")
        else:
            report.finish(part, "done")
    machine.release()
    return True


# -- the supervising process --


def supervise(directory: Path, start_worker: Callable[[], subprocess.Popen[Any]]) -> Report:
    """Run workers until no part is pending, and stop those that take too long.

    Args:
        directory: directory of the report.
        start_worker: starts a process that calls `run_worker`.

    Returns:
        The finished report.
    """
    report = Report.read(directory)
    while pending := report.with_status("pending"):
        if report.time_left() <= 0:
            for part in pending:
                report.finish(part, "skipped", "no time left")
            break
        exit_code = _wait_for_worker(directory, start_worker())
        report = Report.read(directory)
        for part in report.with_status("running"):
            if exit_code is None:
                report.finish(part, "stopped", "over its time")
            else:
                report.finish(part, "failed", f"its process ended with exit code {exit_code}")
        still_pending = report.with_status("pending")
        if len(still_pending) == len(pending):  # another worker would not start a part either
            for part in still_pending:
                report.finish(part, "failed", f"the worker ended with exit code {exit_code}")
    report.write_page()
    return report


def _wait_for_worker(directory: Path, process: subprocess.Popen[Any]) -> int | None:
    """Return the exit code of a worker, or None if it was stopped because it took too long."""
    while (exit_code := process.poll()) is None:
        time.sleep(0.2)
        report = Report.read(directory)
        end = report.started + report.budget_s
        for part in report.with_status("running"):
            end = min(end, part.started + part.cap_s)
        if time.time() > end + GRACE:
            process.kill()
            process.wait()
            return None
        report.write_page()
    return exit_code


def find_revision() -> str:
    """Return the git revision of the source, by default that in the variable GIT_REVISION."""
    if revision := os.environ.get("GIT_REVISION"):
        return revision
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def create_report(
    directory: Path, budget: float, tiny: bool, names: Sequence[str] | None, command: list[str]
) -> Report:
    """Create a report with pending parts and save it.

    Args:
        directory: directory of the report.
        budget: seconds for the whole report.
        tiny: whether networks are tiny, to test the script.
        names: parts to measure; None measures all.
        command: command to record.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = [part for part in plan_parts() if not names or part.name in names]
    if tiny:
        for part in parts:
            part.cap_s = budget  # tests may share the machine with other work
    report = Report(
        directory=directory,
        command=command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        revision=find_revision(),
        budget_s=budget,
        tiny=tiny,
        seed=SEED,
        started=time.time(),
        parts=parts,
    )
    report.save()
    report.write_page()
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; the exit code is 1 if a part failed."""
    part_names = [part.name for part in plan_parts()]
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="Directory of the report.")
    parser.add_argument("--budget", type=float, default=BUDGET, help="Total time in seconds.")
    parser.add_argument("--tiny", action="store_true", help="Tiny networks, to test the script.")
    parser.add_argument("--parts", help=f"Comma-separated parts: {', '.join(part_names)}.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return run_worker(options.out)
    names = options.parts.split(",") if options.parts else None
    if unknown := set(names or ()) - set(part_names):
        parser.error(
            f"unknown parts: {', '.join(sorted(unknown))}. Choose from {', '.join(part_names)}."
        )
    command = _public_command(options)
    create_report(options.out, options.budget, options.tiny, names, command)
    worker_command = [sys.executable, "-m", MODULE, "--worker", "-o", str(options.out)]
    report = supervise(options.out, partial(subprocess.Popen, worker_command))
    log(f"{options.out}: {', '.join(f'{part.name} {part.status}' for part in report.parts)}")
    return int(bool(report.with_status("failed")))


def _public_command(options: argparse.Namespace) -> list[str]:
    """Return the command to record: the output directory is replaced by DIR."""
    command = ["python", "-m", MODULE, "-o", "DIR"]
    if options.budget != BUDGET:
        command += ["--budget", f"{options.budget:g}"]
    if options.tiny:
        command.append("--tiny")
    if options.parts:
        command += ["--parts", options.parts]
    return command


if __name__ == "__main__":
    raise SystemExit(main())
