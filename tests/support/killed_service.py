"""A service that a test kills: it accepts jobs, runs them, and notes what it has done.

Run as a program, it loads the miniature once and forks a service for every line of its input.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.service.jobs import Output, Task
from openpulid.service.queue.dispatcher import Dispatcher
from openpulid.service.queue.engine import LocalEngine
from openpulid.service.store.database import Database
from openpulid.service.store.jobs import JobStore, QueueLimits

ROOT = Path(__file__).parents[2]
OPTIONS = {"num_inference_steps": 2, "width": 64, "height": 64}
MAX_WAITING = 5
FINISH_SECONDS = 120


@contextmanager
def nursery() -> Iterator[subprocess.Popen[str]]:
    """Start the program."""
    paths = [str(ROOT / "src"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.killed_service"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()  # it is ready
        yield process
        process.kill()


def start(process: subprocess.Popen[str], **options: Any) -> int:
    """Start a service; return its process id. The previous one must have ended.

    Args:
        process: the program.
        options: see `serve`.
    """
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(options) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def wait(process: subprocess.Popen[str]) -> int:
    """Wait for the end of a service; return its exit status."""
    assert process.stdout
    return int(process.stdout.readline())


def serve(engine: Any, folder: str, url: str | None, log: str, is_open: bool) -> None:
    """Run jobs; accept new ones without an end, or finish those that are there.

    Args:
        engine: generates the images.
        folder: the data folder.
        url: of the database.
        log: gets a line for every accepted job and every published image.
        is_open: whether jobs are accepted.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*words: object) -> None:
        os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())

    class NotingStore(JobStore):
        def publish(self, task: Task, output: Output) -> bool:
            is_published = super().publish(task, output)
            if is_published:
                note("published", task.job_id, task.index)
            return is_published

    data = Path(folder)
    # the kills are not the fault of a job
    store = NotingStore(Database.open(data, url), data, QueueLimits(interruptions=1000))
    dispatcher = Dispatcher(store, engine, "worker", max_batch=3)
    dispatcher.start()
    while is_open:
        if store.count_waiting() < MAX_WAITING:
            request = GenerationRequest(
                "portrait", seed=None, num_images=random.choice([1, 1, 2]), **OPTIONS
            )
            owner = random.choice(["ann", "ben"])
            job = store.submit(owner, request, {}, "key")
            note("accepted", job.id, owner, request.num_images, request.seed)
        time.sleep(random.uniform(0, 0.05))
    deadline = time.monotonic() + FINISH_SECONDS
    while store.count_unfinished():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    dispatcher.stop()


def main() -> None:
    """Fork a service for every line of the input."""
    torch.set_num_threads(1)
    engine = LocalEngine(device="cpu")
    engine.studio(ModelSelection())
    # a service then starts at once
    with tempfile.TemporaryDirectory() as folder:
        Database.open(Path(folder)).close()
    print("ready", flush=True)
    for line in sys.stdin:
        options = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                serve(engine, **options)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
