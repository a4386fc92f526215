"""The GPU report: what PuLID costs on one accelerator, at full size and with random weights.

    python -m openpulid.bench.perf.gpu -o DIR

Parts run in order of worth in a process of their own, and every row is saved as it comes: a part that fails, hangs or takes
the process with it costs its own rows alone. Nothing is downloaded and nothing is read but the package.
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
    Recorder,
    Report,
    first_lines,
    is_device_lost,
    say,
)

BUDGET = 460.0
SEED = 0
GRACE = 3.0
"""Seconds that a part may go on after its end before its process is stopped."""
LOST = 3
"""Exit code of a worker whose device is lost."""

Measure = Callable[[Recorder, Any], None]


def planned() -> list[PartRecord]:
    """The parts in order of worth."""
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
        PartRecord("train_mini", "The miniature: training, eager", 45, 10),
        PartRecord("train_flux", "FLUX: one training step, stage 1", 45, 15),
        PartRecord("compiled_flux", "FLUX: one step, blocks compiled", 75, 25),
        PartRecord("memory_levels", "FLUX: memory levels", 110, 20),
        PartRecord("compiled_mini", "The miniature: training, compiled", 90, 35),
        PartRecord("compiled_sdxl", "SDXL: one step, compiled", 200, 30),
    ]


def measures() -> Mapping[str, Measure]:
    """What measures each part. Imports torch and diffusers."""
    from openpulid.bench.perf import gpu_inference, gpu_training

    return {
        "sdxl": gpu_inference.sdxl,
        "flux": gpu_inference.flux,
        "train_sdxl": gpu_training.sdxl_stage3,
        "train_mini": gpu_training.miniature,
        "train_flux": gpu_training.flux_stage1,
        "compiled_flux": gpu_inference.compiled_flux,
        "memory_levels": gpu_inference.memory_levels,
        "compiled_mini": gpu_training.compiled_miniature,
        "compiled_sdxl": gpu_inference.compiled_sdxl,
    }


# -- the worker: measures --


def work(
    directory: Path,
    known: Mapping[str, Measure] | None = None,
    machine: Any = None,
) -> int:
    """Measure every pending part of the report in a directory; returns the exit code.

    Args:
        known: what measures each part, by name; `measures` if left out.
        machine: a `gpu_inference.Machine`; the one that is there if left out.
    """
    report = Report.read(directory)
    for part in report.with_status("pending"):
        if not _is_time_for(report, part):
            continue
        if known is None or machine is None:
            from openpulid.bench.perf.gpu_machine import Machine, describe

            machine = machine or Machine.find(report.tiny)
            known = known or measures()
            report.machine = describe(machine)
            say(f"{report.machine.get('device')}, {report.left():.0f} s left")
            if not _is_time_for(report, part):
                continue
        if not _measure(report, part, known[part.name], machine):
            return LOST
    report.save()
    return 0


def _is_time_for(report: Report, part: PartRecord) -> bool:
    if report.left() > part.needs_s * (0 if report.tiny else 1):
        return True
    part.status, part.reason = "skipped", "no time left"
    report.save()
    return False


def _measure(report: Report, part: PartRecord, measure: Measure, machine: Any) -> bool:
    """One part; returns whether the process can go on."""
    part.status, part.begun = "running", time.time()
    report.save()
    say(f"{part.title} ({report.left():.0f} s left)")
    recorder = Recorder(report, part, machine.release)
    usable = True
    try:
        machine.reseed(report.seed)
        measure(recorder, machine)
        part.status = "done"
    except OutOfTime:
        part.status, part.reason = "stopped", "no time left for further rows"
    except DeviceLost:
        part.status, part.reason, usable = "failed", "the device is lost, see the last row", False
    except Exception as error:
        recorder.failed("setup", error)
        part.status, part.reason = "failed", f"{type(error).__name__}: {first_lines(str(error))}"
        usable = not is_device_lost(error)
    if part.status == "done" and all("error" in row for row in part.rows):
        part.status, part.reason = "failed", "no row could be measured"
    part.seconds = round(time.time() - part.begun, 1)
    report.save()
    if usable:
        machine.release()
    return usable


# -- the watcher: starts workers, and stops those that take too long --


def watch(report: Report, start: Callable[[], subprocess.Popen[Any]]) -> None:
    """Until no part is pending: a worker that ends early is followed by another one.

    Args:
        start: begins a worker.
    """
    while report.with_status("pending"):
        if report.left() <= 0:
            for part in report.with_status("pending"):
                part.status, part.reason = "skipped", "no time left"
            break
        before = len(report.with_status("pending"))
        process = start()
        code = _until_end(report, process)
        report.__dict__.update(Report.read(report.directory).__dict__)
        for part in report.with_status("running"):
            part.status = "failed" if code is not None else "stopped"
            part.reason = f"its process ended with {code}" if code is not None else "over its time"
            part.seconds = round(time.time() - part.begun, 1)
        if len(report.with_status("pending")) == before:  # it did not come as far as a part
            for part in report.with_status("pending"):
                part.status, part.reason = "failed", f"the worker ended with {code}"
        report.save()
    report.save()
    report.write_page()


def _until_end(report: Report, process: subprocess.Popen[Any]) -> int | None:
    """The worker's exit code; None where it was stopped because a part took too long."""
    while (code := process.poll()) is None:
        time.sleep(0.2)
        now = Report.read(report.directory)
        running = now.with_status("running")
        ends = [min(part.begun + part.cap_s, now.begun + now.budget_s) for part in running]
        end = min(ends, default=now.begun + now.budget_s)
        if time.time() > end + GRACE:
            process.kill()
            process.wait()
            return None
        now.write_page()
    return code


def revision() -> str:
    """The git revision of the source, or of GIT_REVISION in the environment where there is no repository."""
    if told := os.environ.get("GIT_REVISION"):
        return told
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def begin(
    directory: Path, budget: float, tiny: bool, names: Sequence[str] | None, command: list[str]
) -> Report:
    """A new report in a directory, with every part pending."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = [part for part in planned() if not names or part.name in names]
    for part in parts if tiny else ():
        part.cap_s = budget  # a test may run beside others
    report = Report(
        directory=directory,
        command=command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        revision=revision(),
        budget_s=budget,
        tiny=tiny,
        seed=SEED,
        begun=time.time(),
        parts=parts,
    )
    report.save()
    report.write_page()
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; the exit code is 1 where a part failed."""
    names = [part.name for part in planned()]
    parser = argparse.ArgumentParser(prog="python -m openpulid.bench.perf.gpu", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="Directory of the report.")
    parser.add_argument("--budget", type=float, default=BUDGET, help="Seconds in all.")
    parser.add_argument("--tiny", action="store_true", help="Tiny networks: test the script.")
    parser.add_argument("--parts", help=f"Comma-separated parts; of {', '.join(names)}.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options.out)
    chosen = options.parts.split(",") if options.parts else None
    if unknown := set(chosen or ()) - set(names):
        parser.error(
            f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(names)}"
        )
    command = ["python", "-m", "openpulid.bench.perf.gpu", *(arguments or sys.argv[1:])]
    report = begin(options.out, options.budget, options.tiny, chosen, command)
    worker = [sys.executable, "-m", "openpulid.bench.perf.gpu", "--worker", "-o", str(options.out)]
    watch(report, partial(subprocess.Popen, worker))
    say(f"{options.out}: {', '.join(f'{part.name} {part.status}' for part in report.parts)}")
    return int(bool(report.with_status("failed")))


if __name__ == "__main__":
    raise SystemExit(main())
