"""The queue: jobs are accepted, claimed by workers, and published; each image exactly once.

A worker claims images for a time, its lease, and renews it while it runs. If it ends without a
word, the lease does, too, and the images go back into the queue. The number of the claim tells a
late result from a valid one.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, select, update

from openpulid.errors import OptionError, PulidError, QueueFullError, StoreError
from openpulid.io.lock import lock_directory
from openpulid.pipelines.request import GenerationRequest
from openpulid.service.jobs import Job, JobStatus, Output, Task, is_service_problem
from openpulid.service.store import transitions
from openpulid.service.store.database import Database
from openpulid.service.store.fairness import WaitingJob, choose_batch, count_before
from openpulid.service.store.files import (
    FREE_BYTES,
    check_free_space,
    make_private_folder,
    remove_file,
    remove_orphans,
)
from openpulid.service.store.records import JobFolder, name_inputs, read_job, read_task
from openpulid.service.store.tables import jobs, tasks


@dataclass(frozen=True)
class QueueLimits:
    """What a queue accepts, and for how long it keeps the results.

    Attributes:
        jobs: unfinished jobs of all owners.
        jobs_per_owner: unfinished jobs of one owner.
        lifetime: seconds for which a finished job is kept.
        free_bytes: space on the disk below which no job is accepted, so that the results of those
            that are accepted can be stored.
        interruptions: workers that may end while they run an image, before its job fails. Such an
            image runs alone: if it was the cause, it takes no others with it.
    """

    jobs: int = 1000
    jobs_per_owner: int = 100
    lifetime: float = 24 * 3600
    free_bytes: int = FREE_BYTES
    interruptions: int = 5


@dataclass(frozen=True)
class TaskState:
    """What a worker must know about a task that it runs.

    Attributes:
        is_lost: the job was cancelled or has failed, or another worker has the task: its result
            would not be published.
        is_watched: somebody looks at previews of the job.
    """

    is_lost: bool
    is_watched: bool


class JobStore:
    """The jobs in a database and a data folder. Any number of processes and threads can use it.

    Args:
        database: of `Database.open`.
        folder: the data folder; on several machines it is shared.
        limits: what is accepted.
        clock: the time in seconds since 1970. Clocks of several machines must agree within seconds.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        limits: QueueLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._jobs_folder = folder.absolute() / "jobs"
        self._limits = limits or QueueLimits()
        self._clock = clock
        self._workers_folder = folder.absolute() / "workers"
        make_private_folder(self._jobs_folder)
        make_private_folder(self._workers_folder)

    # For clients.

    def submit(
        self,
        owner: str,
        request: GenerationRequest,
        files: Mapping[str, bytes | Path],
        batch_key: str | None,
    ) -> Job:
        """Accept a job. When this returns, the job survives a crash of the machine.

        Args:
            owner: name of the API key.
            request: the request. What its fields in `files` hold is not read.
            files: path of a field, as in `GenerationRequest.input_files` -> its content, or a file
                of the data folder, such as an identity, that gets a second name.
            batch_key: images of equal keys can run as one batch; None: each runs alone.

        Raises:
            QueueFullError: too many jobs wait.
            RequestError: the request names a file that is not among `files`.
            StoreError: the disk is full, or the database is not available; nothing is accepted.
        """
        request = name_inputs(request, files)
        check_free_space(self._jobs_folder, self._limits.free_bytes)
        with self._database.read() as connection:
            self._check_room(connection, owner)
        job_id = f"job-{secrets.token_hex(16)}"
        folder = self._folder(job_id)
        folder.create(files)
        try:
            with self._database.write() as connection:
                self._check_room(connection, owner)
                transitions.insert_job(
                    connection, job_id, owner, request, files, batch_key, self._clock()
                )
        except BaseException:
            folder.remove()
            raise
        job = self.get(owner, job_id)
        assert job is not None
        return job

    def get(self, owner: str, job_id: str) -> Job | None:
        """Return a job of an owner; None if the owner has no such job.

        Raises:
            StoreError: its record is damaged.
        """
        query = select(tasks).where(tasks.c.job_id == job_id).order_by(tasks.c.number)
        with self._database.read() as connection:
            row = self._find(connection, owner, job_id)
            task_rows = connection.execute(query).all()
        return None if row is None else read_job(row, task_rows, self._folder(job_id))

    def position(self, job_id: str) -> int | None:
        """Return how many images are served before the first one of a job.

        Returns:
            The number, 0 for the next; None if no image of the job waits.
        """
        with self._database.read() as connection:
            waiting = transitions.list_waiting(connection)
        return count_before(waiting, job_id)

    def count_unfinished(self, owner: str | None = None) -> int:
        """Count the jobs that wait or run, of one owner or of all."""
        with self._database.read() as connection:
            return _count_unfinished(connection, owner)

    def count_waiting(self, preset: str | None = None) -> int:
        """Count the images that wait, of one preset or of all."""
        query = select(func.coalesce(func.sum(jobs.c.waiting), 0)).where(jobs.c.waiting > 0)
        if preset is not None:
            query = query.where(jobs.c.preset == preset)
        with self._database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def cancel(self, owner: str, job_id: str) -> Job | None:
        """End a job; its finished images stay. A job that has ended already is not changed.

        Returns:
            The job; None if the owner has no such job.
        """
        with self._database.write() as connection:
            row = self._find(connection, owner, job_id)
            is_active = row is not None and row.status in transitions.UNFINISHED
            if is_active:
                self._end(connection, job_id, JobStatus.CANCELLED)
        if is_active:
            self._folder(job_id).remove_inputs()
        return self.get(owner, job_id)

    def watch(self, job_id: str, seconds: float) -> None:
        """Ask for previews of a job for some time."""
        until = self._clock() + seconds
        with self._database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(watched=until))

    # For workers.

    def claim(
        self, worker: str, limit: int, lease_s: float, presets: Collection[str] | None = None
    ) -> list[Task]:
        """Claim the images that are next, and can run as one batch.

        Images of workers whose lease has ended are put back first. A job whose record or input
        file is damaged fails, and the next one is claimed.

        Args:
            worker: name of the worker.
            limit: the most images.
            lease_s: seconds until the claim ends, unless it is renewed.
            presets: only jobs of these; all by default.

        Returns:
            The tasks; none if no job waits.
        """
        now = self._clock()
        ended: list[str] = []
        claimed: list[Task] = []
        with self._database.write() as connection:
            ended += self._requeue(connection, tasks.c.lease < now)
            while not claimed:
                waiting = transitions.list_waiting(connection, presets)
                batch = choose_batch(waiting, limit)
                if not batch:
                    break
                for job in batch:
                    if job.id in ended:
                        continue
                    try:
                        claimed.append(self._begin(connection, job, worker, now + lease_s))
                    except StoreError as error:
                        self._fail(connection, job.id, error)
                        ended.append(job.id)
            claimed = [task for task in claimed if task.job_id not in ended]
        for job_id in ended:
            self._folder(job_id).remove_inputs()
        return claimed

    def renew(self, claimed: Sequence[Task], lease_s: float) -> None:
        """Extend valid claims."""
        self._update(claimed, lease=self._clock() + lease_s)

    def report_step(self, claimed: Sequence[Task], step: int, total_steps: int) -> None:
        """Note the progress of images that run as one batch.

        Args:
            claimed: the tasks.
            step: steps of each image that are done.
            total_steps: steps of each image.
        """
        self._update(claimed, step=step, total_steps=total_steps)

    def list_states(self, claimed: Sequence[Task]) -> list[TaskState]:
        """Return for each task whether it is to go on, and whether previews are wanted."""
        query = (
            select(tasks.c.job_id, tasks.c.number, tasks.c.attempt, jobs.c.watched)
            .join(jobs, jobs.c.id == tasks.c.job_id)
            .where(transitions.is_held_any(claimed))
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        watched = {tuple(row)[:3]: row.watched > self._clock() for row in rows}
        keys = [(task.job_id, task.index, task.attempt) for task in claimed]
        return [TaskState(key not in watched, watched.get(key, False)) for key in keys]

    def save_preview(self, task: Task, content: bytes) -> None:
        """Replace the preview of a job by another JPEG file; one that has ended keeps none."""
        folder = self._folder(task.job_id)
        folder.save_preview(content)
        if self.list_states([task])[0].is_lost:
            remove_file(folder.preview)

    def publish(self, task: Task, output: Output) -> bool:
        """Publish the image of a task. The last one completes the job.

        Returns:
            Whether it is published; not if the claim is no longer valid.

        Raises:
            StoreError: the disk is full, or the database is not available. Nobody knows whether the
                image is published, and this can be called again.
        """
        folder = self._folder(task.job_id)
        file = folder.save_output(task.index, task.attempt, output.content)
        is_complete = False
        with self._database.write() as connection:
            is_new = transitions.complete_task(connection, task, output.width, output.height)
            if is_new and not transitions.has_unfinished_tasks(connection, task.job_id):
                self._end(connection, task.job_id, JobStatus.COMPLETED)
                is_complete = True
            is_published = is_new or transitions.is_published(connection, task)
        if not is_published:
            remove_file(file)
        if is_complete:
            folder.remove_inputs()
        return is_published

    def fail(self, task: Task, problem: PulidError) -> bool:
        """End the job of a task, with a sentence, which names input files without their folder.

        Args:
            task: the task.
            problem: the fault of the service or of the request, see `is_service_problem`.

        Returns:
            Whether the claim was still valid; otherwise nothing happens.
        """
        with self._database.write() as connection:
            query = select(tasks.c.number).where(transitions.is_held(task))
            is_valid = connection.execute(query).first() is not None
            if is_valid:
                self._fail(connection, task.job_id, problem)
        if is_valid:
            self._folder(task.job_id).remove_inputs()
        return is_valid

    def release(self, claimed: Sequence[Task]) -> None:
        """Put tasks back into the queue, for example before a worker stops."""
        query = select(tasks.c.job_id, tasks.c.number).where(transitions.is_held_any(claimed))
        with self._database.write() as connection:
            rows = connection.execute(query).all()
            transitions.requeue(connection, rows, is_interrupted=False)

    def interrupt(self, claimed: Sequence[Task]) -> None:
        """Put tasks whose process has ended back into the queue; see `QueueLimits`."""
        self._requeue_interrupted(transitions.is_held_any(claimed))

    @contextmanager
    def reserve(self, worker: str) -> Iterator[None]:
        """Reserve the name of a worker for this process inside the block.

        What an earlier process of this name has left goes back into the queue at once.

        Args:
            worker: letters, digits, dots and dashes.

        Raises:
            OptionError: another process works under this name, or it has other characters.
            StoreError: the database is not available.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", worker):
            raise OptionError(
                "the name of a worker has letters, digits, dots and dashes, and begins with a "
                f"letter or digit; got {worker!r}."
            )
        folder = self._workers_folder / worker
        make_private_folder(folder)
        with lock_directory(folder, option="--data"):
            self.recover(worker)
            yield

    def recover(self, worker: str) -> None:
        """Put the tasks of a worker that has ended back into the queue before their lease ends."""
        self._requeue_interrupted(tasks.c.worker == worker)

    def expire(self) -> None:
        """Remove jobs whose time is over, and files that crashes have left."""
        expired = jobs.c.expires <= self._clock()
        with self._database.write() as connection:
            names = connection.execute(select(jobs.c.id).where(expired)).scalars().all()
            connection.execute(delete(jobs).where(expired))
        for job_id in names:
            self._folder(job_id).remove()
        with self._database.read() as connection:
            rows = connection.execute(select(jobs.c.id, jobs.c.status)).all()
        remove_orphans(self._jobs_folder, {row.id for row in rows})
        for row in rows:
            if row.status not in transitions.UNFINISHED:
                self._folder(row.id).remove_inputs()

    def _requeue_interrupted(self, condition: ColumnElement[bool]) -> None:
        with self._database.write() as connection:
            failed = self._requeue(connection, condition)
        for job_id in failed:
            self._folder(job_id).remove_inputs()

    # Within transactions.

    def _check_room(self, connection: Connection, owner: str) -> None:
        if _count_unfinished(connection, owner) >= self._limits.jobs_per_owner:
            raise QueueFullError(
                f"{self._limits.jobs_per_owner} jobs of this key wait already; try again later."
            )
        if _count_unfinished(connection) >= self._limits.jobs:
            raise QueueFullError("too many jobs wait already; try again later.")

    def _find(self, connection: Connection, owner: str, job_id: str) -> Any:
        query = select(jobs).where(jobs.c.id == job_id, jobs.c.owner == owner)
        return connection.execute(query).first()

    def _begin(self, connection: Connection, job: WaitingJob, worker: str, lease: float) -> Task:
        begun = transitions.begin_task(connection, job, worker, lease, self._clock())
        row = self._find(connection, job.owner, job.id)
        return read_task(row, *begun, self._folder(job.id))

    def _end(self, connection: Connection, job_id: str, status: JobStatus, **reason: Any) -> None:
        now = self._clock()
        transitions.end_job(connection, job_id, status, now, now + self._limits.lifetime, **reason)

    def _fail(self, connection: Connection, job_id: str, problem: PulidError) -> None:
        sentence = str(problem).replace(f"{self._folder(job_id).inputs}/", "")
        self._end(
            connection,
            job_id,
            JobStatus.FAILED,
            problem=sentence,
            is_service_problem=is_service_problem(problem),
        )

    def _requeue(self, connection: Connection, condition: ColumnElement[bool]) -> list[str]:
        """Put interrupted tasks back into the queue; return the jobs that have failed instead."""
        query = select(tasks.c.job_id, tasks.c.number, tasks.c.interruptions).where(
            tasks.c.status == transitions.RUNNING, condition
        )
        rows = connection.execute(query).all()
        failed = {row.job_id for row in rows if row.interruptions >= self._limits.interruptions}
        transitions.requeue(
            connection, [row for row in rows if row.job_id not in failed], is_interrupted=True
        )
        for job_id in failed:
            problem = StoreError(
                f"the service was interrupted {self._limits.interruptions + 1} times while it ran "
                "this job; try a smaller size or fewer images."
            )
            self._fail(connection, job_id, problem)
        return list(failed)

    def _update(self, claimed: Sequence[Task], **values: Any) -> None:
        condition = transitions.is_held_any(claimed)
        with self._database.write() as connection:
            connection.execute(update(tasks).where(condition).values(**values))

    def _folder(self, job_id: str) -> JobFolder:
        return JobFolder(self._jobs_folder, job_id)


def _count_unfinished(connection: Connection, owner: str | None = None) -> int:
    query = select(func.count()).select_from(jobs)
    query = query.where(jobs.c.status.in_(transitions.UNFINISHED))
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    return int(connection.execute(query).scalar_one())
