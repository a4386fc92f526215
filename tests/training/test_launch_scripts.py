"""The scripts that start training on several GPUs, with programs that print their arguments."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*"
echo "shutdown $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    for name in ("srun", "torchrun", "scontrol"):
        path = tmp_path / name
        path.write_text(PROGRAM)
        path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("name", ["train.slurm", "train-torchrun.sh"])
def test_script_leaves_time_to_save(name: str, programs: Path) -> None:
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "nodes[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "32",
    }
    command = ["bash", str(DEPLOY / name), "photos", "runs/a"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    started, shutdown = done.stdout.splitlines()
    assert "pulid train flux_stage1 --data photos --shard -o runs/a" in started
    if name == "train.slurm":
        assert started.startswith("srun --cpus-per-task 32 torchrun ")
        (signal,) = re.findall(r"--signal=TERM@(\d+)", (DEPLOY / name).read_text("utf-8"))
        assert int(shutdown.split()[1]) < int(signal)
    assert int(shutdown.split()[1]) >= 240
