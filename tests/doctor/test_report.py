"""`pulid doctor`: devices, presets, disk space, the whole report, and broken installations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from openpulid.device import list_devices, memory_size, select_device
from openpulid.doctor import devices, presets, providers, storage
from openpulid.doctor.report import CHECKS, run_check
from openpulid.pipelines.presets import PRESETS

SOURCE = Path(__file__).parents[2] / "src"

COMMAND = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("network:", event, arguments, file=sys.stderr)
        raise RuntimeError("the network is used")

sys.addaudithook(refuse)
sys.argv = ["pulid", "doctor", *sys.argv[1:]]
from openpulid.cli.main import main
main()
"""


def run_doctor(*options: str, path: Path = SOURCE) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(path), str(SOURCE)))}
    command = [sys.executable, "-c", COMMAND, *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_installation_of_the_tests_works_without_network() -> None:
    done = run_doctor("--json")
    report = json.loads(done.stdout)
    assert "network" not in done.stderr
    assert [name for name in CHECKS if not report[name]] == []
    assert report["miniature"][0]["miniature"] == "works"
    assert done.returncode == (0 if report["ok"] else 2), report["problems"]
    rows = {row["preset"]: row for row in report["presets"]}
    assert list(rows) == list(PRESETS) and rows["mini"]["state"].startswith("complete: pulid")
    versions = {row["package"]: row["version"] for row in report["packages"]}
    assert versions["torch"] == torch.__version__.split("+")[0]
    # every problem is a sentence with its fix
    assert all(text.endswith(".") and ";" in text for text in report["problems"])


def test_broken_torch_ends_no_other_check(tmp_path: Path) -> None:
    reason = "libcudart.so.12: file too short"
    (tmp_path / "torch.py").write_text(f"raise ImportError({reason!r})")
    done = run_doctor(path=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"problem: torch cannot be imported: {reason}; ") for line in lines)
    assert f"problem: miniature cannot be checked: {reason}." in lines
    assert any(line.startswith("numpy\t") and line.endswith("\tworks") for line in lines)


def test_failed_check_is_a_problem_of_its_own() -> None:
    section = run_check("no_such_check")
    assert section.rows == ()
    assert section.problems[0].startswith("no_such_check cannot be checked: No module named")


def test_devices_have_memory_and_dtypes() -> None:
    assert [select_device(str(device)) for device in list_devices()] == list_devices()
    cpu = torch.device("cpu")
    assert (memory_size(cpu) or 0) > 2**30
    row = devices.check().rows[0]
    assert row[0] == "cpu" and row[2].endswith(" GiB") and row[3].startswith("float32")
    assert ("bfloat16" in row[3]) == (row[4] == "bfloat16")


@pytest.mark.parametrize(
    ("driver", "cuda", "available", "fix"),
    [
        (True, None, False, "install PyTorch for CUDA"),
        (True, "12.8", False, "update the driver"),
        (True, "12.8", True, None),
        (False, "12.8", False, None),
    ],
)
def test_unused_gpu_is_a_problem(
    driver: bool, cuda: str | None, available: bool, fix: str | None
) -> None:
    problem = devices.find_driver_problem(driver, cuda, available)
    assert fix in problem if fix else not problem


@pytest.mark.parametrize(
    ("types", "names", "is_noted"),
    [
        (["cpu", "cuda"], ["CPUExecutionProvider"], True),
        (["cpu", "cuda"], ["CUDAExecutionProvider", "CPUExecutionProvider"], False),
        (["cpu", "mps"], ["CPUExecutionProvider"], False),
        (["cpu"], ["CPUExecutionProvider"], False),
    ],
)
def test_a_gpu_without_its_provider_is_noted(
    types: list[str], names: list[str], is_noted: bool
) -> None:
    assert bool(providers.describe_unused_gpu(types, names)) == is_noted


def test_presets_name_what_they_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "glintr100.onnx").touch()
    monkeypatch.setenv("PULID_WEIGHTS", str(folder))
    rows = {row[0]: row[1:] for row in presets.check().rows}
    assert rows["sdxl"] == (
        "lacks juggernaut, pulid-v1.1, detector, parsing, eva",
        "about 8846 MB",
        "pulid weights get sdxl",
    )
    assert rows["mini-lightning"][0].startswith("complete: pulid")
    uses = {row[1]: row[0] for row in storage.check().rows}
    assert uses == {
        str(tmp_path / "cache"): "downloads",
        str(tmp_path / "torch" / "hub" / "checkpoints"): "downloads",
        str(folder): "PULID_WEIGHTS",
    }
    monkeypatch.setenv("PULID_WEIGHTS", str(tmp_path / "none"))
    (problem,) = storage.check().problems
    assert "none, which is no folder; correct or unset it." in problem


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system without free space")
def test_lack_of_space_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/cache/hub")
    section = presets.check()
    assert section.problems == ()
    (note,) = [text for text in section.notes if text.startswith("preset 'sdxl' does")]
    assert "MB in /proc/cache/hub, which has 0 MB; free some space" in note
