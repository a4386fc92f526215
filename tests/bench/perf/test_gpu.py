"""Tests of the GPU report: the script with tiny networks on a CPU, and parts that fail."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from openpulid.bench.perf import gpu, gpu_machine, timing
from openpulid.bench.perf.gpu_report import (
    PartRecord,
    Recorder,
    Report,
    describe_error,
    render_page,
    strip_paths,
)

NAMES = [part.name for part in gpu.plan_parts()]
ROOT = Path(__file__).parents[3]


def create_report(directory: Path, *names: str, budget: float = 300.0) -> Report:
    return gpu.create_report(directory, budget, True, names or None, ["test"])


def read_json(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "gpu-report.json").read_text("utf-8"))


def fake_machine() -> Any:
    return SimpleNamespace(
        release=lambda: None,
        set_seed=lambda seed: None,
        device=torch.device("cpu"),
        dtype=torch.float32,
        tiny=True,
    )


def record_one_row(recorder: Recorder, machine: Any) -> None:
    recorder.attempt("row", lambda: {"ms": 1.0})


@pytest.fixture
def frozen_imports() -> None:
    """Let the garbage collector, which runs before every row, ignore what is imported."""
    gpu.load_measures()
    gc.collect()
    gc.freeze()


def test_every_part_measures_tiny_networks(tmp_path: Path, frozen_imports: None) -> None:
    create_report(tmp_path)
    assert gpu.run_worker(tmp_path) == 0
    report = read_json(tmp_path)
    assert [part["name"] for part in report["parts"]] == NAMES
    errors = [row for part in report["parts"] for row in part["rows"] if "error" in row]
    assert not errors and {part["status"] for part in report["parts"]} == {"done"}
    assert report["tiny"] and report["machine"]["torch"] == torch.__version__
    assert {"command", "date", "revision", "budget_s", "seed", "units"} <= report.keys()
    rows = {part["name"]: part["rows"] for part in report["parts"]}
    candidates = ["base", "with identity", "identity recomputed every step"]
    assert [row["candidate"] for row in rows["sdxl"][:3]] == candidates
    assert [row["candidate"] for row in rows["flux"]] == candidates * 2
    for part in ("sdxl", "flux"):
        identity_rows = [row for row in rows[part] if row["candidate"] == "with identity"]
        assert all(row["within"] > 1 and row["output_change"] > 1e-3 for row in identity_rows)
    assert [(row["k"], row["recompute"]) for row in rows["train_sdxl"]] == [
        (4, "none"),
        (4, "U-Net blocks"),
        (4, "both"),
    ]
    assert all(row["images_per_s"] > 0 for row in rows["train_mini"])
    assert {row["row"] for row in rows["flux_levels"]} == {"full", "24gb", "12gb"}
    assert {row["row"] for row in rows["sdxl_levels"]} == {"full", "12gb", "8gb", "6gb"}
    assert [row["phase"] for row in rows["sdxl_levels"][:3]] == ["text", "steps", "decode"]
    assert rows["compiled_sdxl"][-1]["output_change"] > 1e-3
    text = render_page(Report.read(tmp_path))
    assert all(part["title"] in text for part in report["parts"]) and "with identity" in text


def test_failing_row_or_part_does_not_stop_the_others(tmp_path: Path) -> None:
    def run_out_of_memory(recorder: Recorder, machine: Any) -> None:
        def allocate() -> dict[str, Any]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        assert not recorder.attempt("too large", allocate)
        recorder.attempt("small", lambda: {"ms": 2.0})

    def fail(recorder: Recorder, machine: Any) -> None:
        raise ValueError("no such network")

    create_report(tmp_path, "sdxl", "flux", "train_sdxl")
    measures = {"sdxl": run_out_of_memory, "flux": fail, "train_sdxl": record_one_row}
    assert gpu.run_worker(tmp_path, measures, fake_machine()) == 0
    parts = {part["name"]: part for part in read_json(tmp_path)["parts"]}
    assert parts["sdxl"]["status"] == "done" and parts["sdxl"]["rows"][1]["ms"] == 2.0
    assert "out of memory" in parts["sdxl"]["rows"][0]["error"]
    assert parts["flux"]["status"] == "failed" and "no such network" in parts["flux"]["reason"]
    assert "test_gpu.py" in parts["flux"]["rows"][0]["where"]
    assert parts["train_sdxl"]["status"] == "done"


def test_missing_miniature_skips_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_machine, "MINIATURE", tmp_path / "weights")
    machine = gpu_machine.Machine(torch.device("cpu"), torch.float32)
    create_report(tmp_path, "train_mini", "compiled_mini")
    assert gpu.run_worker(tmp_path, machine=machine) == 0
    for part in read_json(tmp_path)["parts"]:
        assert part["status"] == "skipped" and not part["rows"]
        assert part["reason"] == "the miniature's weights are not there"
    page = render_page(Report.read(tmp_path))
    assert page.count("**skipped**: the miniature's weights are not there") == 2


def test_errors_contain_no_machine_paths(tmp_path: Path) -> None:
    def fail_in_library(recorder: Recorder, machine: Any) -> None:
        recorder.attempt("missing", (tmp_path / "weights" / "config.json").read_text)
        recorder.attempt("library", lambda: nn.Linear(2, 2)(torch.zeros(3)))

    create_report(tmp_path, "sdxl")
    gpu.run_worker(tmp_path, {"sdxl": fail_in_library}, fake_machine())
    missing, library = read_json(tmp_path)["parts"][0]["rows"]
    assert missing["error"].endswith("No such file or directory: 'config.json'")
    assert 'File "openpulid/bench/perf/gpu_report.py"' in missing["where"]
    assert 'File "torch/nn/modules/linear.py"' in library["where"]
    text = (tmp_path / "gpu-report.json").read_text("utf-8")
    paths = [str(tmp_path), str(ROOT), sys.prefix, "site-packages"]
    assert not [path for path in paths if path in text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'File "{ROOT}/src/openpulid/errors.py", line 3', 'File "openpulid/errors.py", line 3'),
        ("no '/mnt/a/b.json' or /opt/c.txt", "no 'b.json' or c.txt"),
        ("cc -I/opt/cuda/include -o=/tmp/x/y.so", "cc -Iinclude -o=y.so"),
        (
            "see https://docs.nvidia.com/cuda/index.html",
            "see https://docs.nvidia.com/cuda/index.html",
        ),
        ("mini/weights/pipeline, 41 / 49 / 56", "mini/weights/pipeline, 41 / 49 / 56"),
    ],
)
def test_machine_paths_are_removed_from_text(text: str, expected: str) -> None:
    assert strip_paths(text) == expected
    assert describe_error(ValueError(text)) == f"ValueError: {expected}"


def test_recorded_command_does_not_contain_the_output_directory(tmp_path: Path) -> None:
    arguments = [f"--out={tmp_path}", "--tiny", "--budget", "0", "--parts", "sdxl,flux"]
    assert gpu.main(arguments) == 0
    command = "python -m openpulid.bench.perf.gpu -o DIR --budget 0 --tiny --parts sdxl,flux"
    assert " ".join(read_json(tmp_path)["command"]) == command
    assert f"`{command}`" in (tmp_path / "gpu-report.md").read_text("utf-8")


def test_time_runs_out_between_rows(tmp_path: Path) -> None:
    def measure_slowly(recorder: Recorder, machine: Any) -> None:
        recorder.attempt("first", lambda: time.sleep(0.2) or {"ms": 1.0})
        recorder.attempt("second", lambda: {"ms": 1.0}, needs_s=10)

    report = create_report(tmp_path, "sdxl", "flux")
    report.parts[0].cap_s = 5
    report.save()
    gpu.run_worker(tmp_path, {"sdxl": measure_slowly, "flux": record_one_row}, fake_machine())
    parts = read_json(tmp_path)["parts"]
    assert [part["status"] for part in parts] == ["stopped", "done"]
    assert [row.get("error") for row in parts[0]["rows"]] == [None, "skipped: no time left"]


def test_all_parts_are_skipped_without_time(tmp_path: Path) -> None:
    assert gpu.main(["-o", str(tmp_path), "--tiny", "--budget", "0"]) == 0
    parts = read_json(tmp_path)["parts"]
    assert [part["name"] for part in parts] == NAMES
    assert {(part["status"], part["reason"]) for part in parts} == {("skipped", "no time left")}
    assert "**skipped**: no time left" in (tmp_path / "gpu-report.md").read_text("utf-8")


# Without PyTorch, whose import takes longer than everything else.
WORKER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from openpulid.bench.perf import gpu

def record_one_row(recorder, machine): recorder.attempt("row", lambda: {"ms": 1.0})
def crash(recorder, machine): os._exit(9)
def hang(recorder, machine): time.sleep(60)
def lose_device(recorder, machine):
    def fail(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    recorder.attempt("row", fail)

measures = {
    "sdxl": crash, "flux": hang, "train_sdxl": lose_device, "train_mini": record_one_row,
}
machine = SimpleNamespace(release=lambda: None, set_seed=lambda seed: None)
sys.exit(gpu.run_worker(Path(sys.argv[1]), measures, machine))
"""


def test_crashing_or_hanging_part_loses_only_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = create_report(tmp_path, "sdxl", "flux", "train_sdxl", "train_mini")
    report.parts[1].cap_s = 0.2
    report.save()
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    workers: list[subprocess.Popen[Any]] = []

    def start_worker() -> subprocess.Popen[Any]:
        environment = {**gpu.os.environ, "PYTHONPATH": ":".join([str(ROOT), *sys.path])}
        command = [sys.executable, "-c", WORKER, str(tmp_path)]
        workers.append(subprocess.Popen(command, env=environment))
        return workers[-1]

    gpu.supervise(tmp_path, start_worker)
    parts = read_json(tmp_path)["parts"]
    assert [part["status"] for part in parts] == ["failed", "stopped", "failed", "done"]
    assert "ended with exit code 9" in parts[0]["reason"]
    assert "over its time" in parts[1]["reason"]
    assert "illegal memory access" in parts[2]["rows"][0]["error"]
    assert len(workers) == 4


def test_worker_that_cannot_start_is_not_restarted(tmp_path: Path) -> None:
    create_report(tmp_path, "sdxl", "flux")
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    gpu.supervise(tmp_path, lambda: subprocess.Popen(command))
    reasons = {part["reason"] for part in read_json(tmp_path)["parts"]}
    assert reasons == {"the worker ended with exit code 7"}


def test_hooks_on_an_accelerator_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 20.0, 24.0])  # milliseconds

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.time: float | None = None

        def record(self) -> None:
            self.time = next(clock)

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    synchronized: list[torch.device] = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronized.append)
    device = torch.device("cuda", 0)
    module = nn.Identity()
    with timing.time_hooks([module], device) as seconds:
        assert module(1) + module(1) == 2 and not seconds
    assert seconds == [0.003, 0.004] and synchronized == [device]
    assert not module._forward_hooks


def test_cell_values_cannot_break_a_table() -> None:
    rows = [{"row": "x|y", "ms": 1}, {"row": "z", "s": 2}]
    part = PartRecord("a", "A", 1, 1, "done", rows=rows)
    report = Report(Path(), ["run"], "today", "", 1, False, 0, 0, parts=[part])
    text = render_page(report)
    assert "| row | ms | s |" in text and "| x\\|y | 1 |  |" in text
