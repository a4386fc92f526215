"""A full disk: one sentence each, and everything goes on when there is room again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FULL = "the disk of the service is full; try again later."

# a disk of 12 MB in a namespace of its own, for which no rights are needed
SCRIPT = 'mount -t tmpfs -o size=12m none "$1" && exec "$2" -m tests.support.full_disk "$1/data"'
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def test_full_disk(tmp_path: Path) -> None:
    probe = ["mount", "-t", "tmpfs", "none", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, *probe]).returncode:
        pytest.skip("no disk can be mounted")
    process = subprocess.run(
        [*NAMESPACE, "sh", "-c", SCRIPT, "sh", str(tmp_path), sys.executable],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
    )
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout)
    # a refused job leaves no folder; an accepted one can still be read
    assert answers == {
        "submit": FULL,
        "submit_to_the_last": FULL,
        "folders": 0,
        "claim": FULL,
        "get": True,
        "position": 0,
        "publish": FULL,
        "publish_later": True,
    }
