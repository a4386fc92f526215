"""The GPU report: the same script with tiny networks on a CPU, and what happens when a part fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openpulid.bench.perf import gpu, timing
from openpulid.bench.perf.gpu_report import PartRecord, Recorder, Report, page

NAMES = [part.name for part in gpu.planned()]


def report_in(directory: Path, *names: str, budget: float = 300.0) -> Report:
    return gpu.begin(directory, budget, True, names or None, ["test"])


def saved(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "gpu-report.json").read_text("utf-8"))


def machine() -> Any:
    return SimpleNamespace(
        release=lambda: None,
        reseed=lambda seed: None,
        device=torch.device("cpu"),
        dtype=torch.float32,
        tiny=True,
    )


def one_row(run: Recorder, machine: Any) -> None:
    run.attempt("row", lambda: {"ms": 1.0})


def test_every_part_measures_tiny_networks(tmp_path: Path) -> None:
    report_in(tmp_path)
    assert gpu.work(tmp_path) == 0
    found = saved(tmp_path)
    assert [part["name"] for part in found["parts"]] == NAMES
    errors = [row for part in found["parts"] for row in part["rows"] if "error" in row]
    assert not errors and {part["status"] for part in found["parts"]} == {"done"}
    assert found["tiny"] and found["machine"]["torch"] == torch.__version__
    assert {"command", "date", "revision", "budget_s", "seed", "units"} <= found.keys()
    rows = {part["name"]: part["rows"] for part in found["parts"]}
    candidates = ["base", "with identity", "identity recomputed every step"]
    assert [row["candidate"] for row in rows["sdxl"][:3]] == candidates
    assert [row["candidate"] for row in rows["flux"]] == candidates * 2
    for part in ("sdxl", "flux"):
        shown = [row for row in rows[part] if row["candidate"] == "with identity"]
        assert all(row["within"] > 1 and row["output_change"] > 1e-3 for row in shown)
    assert [(row["k"], row["recompute"]) for row in rows["train_sdxl"]] == [
        (4, "none"),
        (4, "U-Net blocks"),
        (4, "both"),
    ]
    assert all(row["images_per_s"] > 0 for row in rows["train_mini"])
    assert {row["row"] for row in rows["memory_levels"]} == {"full", "24gb", "12gb"}
    assert rows["compiled_sdxl"][-1]["output_change"] > 1e-3
    text = page(Report.read(tmp_path))
    assert all(part["title"] in text for part in found["parts"]) and "with identity" in text


def test_a_failing_row_or_part_does_not_stop_the_rest(tmp_path: Path) -> None:
    def full(run: Recorder, machine: Any) -> None:
        def memory() -> dict[str, Any]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        assert not run.attempt("too large", memory)
        run.attempt("small", lambda: {"ms": 2.0})

    def broken(run: Recorder, machine: Any) -> None:
        raise ValueError("no such network")

    report_in(tmp_path, "sdxl", "flux", "train_sdxl")
    known = {"sdxl": full, "flux": broken, "train_sdxl": one_row}
    assert gpu.work(tmp_path, known, machine()) == 0
    parts = {part["name"]: part for part in saved(tmp_path)["parts"]}
    assert parts["sdxl"]["status"] == "done" and parts["sdxl"]["rows"][1]["ms"] == 2.0
    assert "out of memory" in parts["sdxl"]["rows"][0]["error"]
    assert parts["flux"]["status"] == "failed" and "no such network" in parts["flux"]["reason"]
    assert "test_gpu.py" in parts["flux"]["rows"][0]["where"]
    assert parts["train_sdxl"]["status"] == "done"


def test_time_runs_out_between_rows(tmp_path: Path) -> None:
    def slow(run: Recorder, machine: Any) -> None:
        run.attempt("first", lambda: time.sleep(0.2) or {"ms": 1.0})
        run.attempt("second", lambda: {"ms": 1.0}, needs_s=10)

    report = report_in(tmp_path, "sdxl", "flux")
    report.parts[0].cap_s = 5
    report.save()
    gpu.work(tmp_path, {"sdxl": slow, "flux": one_row}, machine())
    parts = saved(tmp_path)["parts"]
    assert [part["status"] for part in parts] == ["stopped", "done"]
    assert [row.get("error") for row in parts[0]["rows"]] == [None, "skipped: no time left"]


def test_without_time_all_is_skipped_and_reported(tmp_path: Path) -> None:
    assert gpu.main(["-o", str(tmp_path), "--tiny", "--budget", "0"]) == 0
    parts = saved(tmp_path)["parts"]
    assert [part["name"] for part in parts] == NAMES
    assert {(part["status"], part["reason"]) for part in parts} == {("skipped", "no time left")}
    assert "**skipped**: no time left" in (tmp_path / "gpu-report.md").read_text("utf-8")


WORKER = """
import os, sys, time
from pathlib import Path
from openpulid.bench.perf import gpu, timing
from openpulid.bench.perf.gpu_report import DeviceLost
from tests.bench.perf.test_gpu import machine, one_row

def dies(run, machine): os._exit(9)
def hangs(run, machine): time.sleep(60)
def loses(run, machine):
    def row(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    run.attempt("row", row)

known = {"sdxl": dies, "flux": hangs, "train_sdxl": loses, "train_mini": one_row}
sys.exit(gpu.work(Path(sys.argv[1]), known, machine()))
"""


def test_a_part_that_dies_or_hangs_costs_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_in(tmp_path, "sdxl", "flux", "train_sdxl", "train_mini")
    report.parts[1].cap_s = 0.2
    report.save()
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    started: list[int] = []

    def start() -> subprocess.Popen[Any]:
        started.append(1)
        paths = {"PYTHONPATH": ":".join([str(Path(__file__).parents[3]), *sys.path])}
        command = [sys.executable, "-c", WORKER, str(tmp_path)]
        return subprocess.Popen(command, env={**gpu.os.environ, **paths})

    gpu.watch(report, start)
    parts = saved(tmp_path)["parts"]
    assert [part["status"] for part in parts] == ["failed", "stopped", "failed", "done"]
    assert "ended with 9" in parts[0]["reason"] and "over its time" in parts[1]["reason"]
    assert "illegal memory access" in parts[2]["rows"][0]["error"]
    assert len(started) == 4


def test_a_worker_that_cannot_begin_is_not_started_for_ever(tmp_path: Path) -> None:
    report = report_in(tmp_path, "sdxl", "flux")
    gpu.watch(report, lambda: subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]))
    assert {part["reason"] for part in saved(tmp_path)["parts"]} == {"the worker ended with 7"}


def test_an_accelerator_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 20.0, 24.0])  # milliseconds

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.time: float | None = None

        def record(self) -> None:
            self.time = next(clock)

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    class Work:
        def done(self) -> int:
            return 1

    waited: list[torch.device] = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    plain, device = Work.done, torch.device("cuda", 0)
    with timing.seconds_in(Work, "done", device) as seconds:
        assert Work().done() + Work().done() == 2 and not seconds
    assert seconds == [0.003, 0.004] and waited == [device] and Work.done is plain


def test_a_cell_of_the_page_cannot_break_its_table() -> None:
    part = PartRecord("a", "A", 1, 1, "done", rows=[{"row": "x|y", "ms": 1}, {"row": "z", "s": 2}])
    report = Report(Path(), ["run"], "today", "", 1, False, 0, 0, parts=[part])
    text = page(report)
    assert "| row | ms | s |" in text and "| x\\|y | 1 |  |" in text
