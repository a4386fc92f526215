"""The command `pulid serve`, as its user starts and stops it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from openpulid.cli.main import app
from openpulid.errors import OptionError
from tests.service.api.conftest import ANNA

COMMAND = (sys.executable, "-c", "from openpulid.cli.main import main; main()", "serve")


@contextmanager
def start(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command; yield its process and its address."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--data", str(folder), "--device", "cpu", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    try:
        match = re.search(r"http://\S+:\d+", line)
        assert match, line + process.stderr.read()
        yield process, match[0]
    finally:
        process.kill()
        process.wait()


def wait_until_ready(url: str) -> None:
    for _ in range(600):
        if httpx.get(f"{url}/readyz").status_code == 200:
            return
        time.sleep(0.1)
    raise AssertionError("the service is not ready")


def test_command_serves_and_stops_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    keys = tmp_path / "keys"
    keys.write_text(f"anna {ANNA}\n")
    client = httpx.Client(headers={"Authorization": f"Bearer {ANNA}"}, timeout=60)
    with start(folder, "--api-keys", str(keys)) as (process, url):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert client.get(f"{url}/v1/models", headers={"Host": "a.example"}).status_code == 200
        wait_until_ready(url)
        body = {"prompt": "portrait", "num_steps": 2, "seed": 1}
        answer = client.post(f"{url}/v1/images/generations", json=body).raise_for_status().json()
        assert [image["seed"] for image in answer["data"]] == [1]
        client.post(f"{url}/v1/jobs", json={**body, "num_steps": 100}).raise_for_status()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to other machines; add --api-keys"),
        (["--api-keys", "missing"], "missing cannot be read"),
        (["--preset", "minni"], "did you mean 'mini'"),
        (["--rate", "often"], "'often' is not a rate"),
        (["--database", "mysql://x"], "the database must be PostgreSQL"),
        (["--memory", "12gb"], "has no memory levels; leave --memory out"),
    ],
)
def test_mistakes_of_the_operator(tmp_path: Path, options: list[str], sentence: str) -> None:
    data = ["--data", str(tmp_path / "data"), "--port", "0"]
    result = CliRunner().invoke(app, ["serve", *data, *options])
    assert isinstance(result.exception, OptionError)
    assert sentence in str(result.exception)
