"""A worker whose engine loses its process, such as a replica on another machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.service.jobs import Job, JobStatus, Task
from openpulid.service.queue.dispatcher import Dispatcher
from openpulid.service.queue.engine import Interrupted, LocalEngine, OnStep, Result
from openpulid.service.store.database import Database
from openpulid.service.store.jobs import JobStore, QueueLimits

OPTIONS = {"model": ModelSelection(), "width": 64, "height": 64, "num_inference_steps": 2}


class FragileEngine(LocalEngine):
    """Loses its process while it runs one seed."""

    batches: list[list[int]]

    def run(self, tasks: Sequence[Task], on_step: OnStep) -> Iterator[tuple[Task, Result]]:
        """See `Engine.run`."""
        seeds = [task.request.seed for task in tasks]
        self.batches.append(seeds)
        if 13 in seeds:
            raise Interrupted
        yield from super().run(tasks, on_step)


def finish(store: JobStore, job_id: str) -> Job:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = store.get("ann", job_id)
        assert job is not None
        if job.status.is_final:
            return job
        time.sleep(0.01)
    raise TimeoutError(job_id)


def test_an_image_that_ends_its_process_takes_no_others_with_it(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    store = JobStore(database, tmp_path, QueueLimits(interruptions=3))
    engine = FragileEngine("cpu")
    engine.batches = []
    requests = [GenerationRequest("portrait", seed=seed, **OPTIONS) for seed in (12, 13, 14)]
    ids = [store.submit("ann", request, {}, batch_key="all") for request in requests]
    worker = Dispatcher(store, engine, "worker")
    worker.start()
    jobs = [finish(store, job.id) for job in ids]
    worker.stop()
    database.close()

    assert [job.status for job in jobs] == [
        JobStatus.COMPLETED,
        JobStatus.FAILED,
        JobStatus.COMPLETED,
    ]
    assert jobs[1].problem and "interrupted 4 times" in jobs[1].problem
    assert engine.batches[0] == [12, 13, 14]
    assert engine.batches.count([13]) == 3
