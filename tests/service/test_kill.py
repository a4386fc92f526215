"""Services that are killed at random moments lose no accepted job and publish no image twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from sqlalchemy import text

from openpulid.service.jobs import JobStatus
from openpulid.service.store.database import Database
from openpulid.service.store.jobs import JobStore
from tests.support.killed_service import MAX_WAITING, nursery, start, wait

KILLS = 6


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    with nursery() as process:
        yield process


def test_killed_services_lose_nothing_and_repeat_nothing(
    process: subprocess.Popen[str], database_url: str | None, tmp_path: Path
) -> None:
    data, log = tmp_path / "data", tmp_path / "log"
    options = {"folder": str(data), "url": database_url, "log": str(log)}
    moments = random.Random(7)
    for kill in range(KILLS):
        service = start(process, is_open=True, **options)
        if kill % 3:  # else it may be killed while it starts
            wait_for_line(log)
        time.sleep(moments.uniform(0, 0.6))
        os.kill(service, signal.SIGKILL)
        assert wait(process) == -signal.SIGKILL
    start(process, is_open=False, **options)
    assert wait(process) == 0

    lines = [line.split() for line in log.read_text().splitlines()]
    accepted = [line[1:] for line in lines if line[0] == "accepted"]
    published = [tuple(line[1:]) for line in lines if line[0] == "published"]
    assert len(accepted) >= MAX_WAITING
    assert max(Counter(published).values()) == 1
    database = Database.open(data, database_url)
    store = JobStore(database, data)
    with database.read() as connection:
        query = text("SELECT count(*) FROM tasks WHERE interruptions > 0")
        num_interrupted = connection.execute(query).scalar_one()
    for job_id, owner, count, seed in accepted:
        job = store.get(owner, job_id)
        assert job is not None and job.status == JobStatus.COMPLETED
        assert [image.seed for image in job.images] == [int(seed) + k for k in range(int(count))]
        for image in job.images:
            assert image.file is not None
            with Image.open(image.file) as opened:
                opened.load()
    database.close()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "log"}
    if not num_interrupted:
        pytest.skip("no job was running when the service was killed; nothing else was lost")


def wait_for_line(log: Path) -> None:
    """Wait until the service notes something."""
    size = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + 60
    while not log.exists() or log.stat().st_size == size:
        assert time.monotonic() < deadline
        time.sleep(0.01)
