"""The steps of jobs and tasks, each within a transaction that excludes other writers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, insert, or_, select, update

from openpulid.errors import StoreError
from openpulid.pipelines.request import GenerationRequest
from openpulid.service.jobs import JobStatus, Task
from openpulid.service.store.fairness import WaitingJob
from openpulid.service.store.records import DAMAGED
from openpulid.service.store.tables import jobs, owners, tasks

QUEUED = JobStatus.QUEUED.value
RUNNING = JobStatus.RUNNING.value
COMPLETED = JobStatus.COMPLETED.value
CANCELLED = JobStatus.CANCELLED.value
UNFINISHED = (QUEUED, RUNNING)


def insert_job(
    connection: Connection,
    job_id: str,
    owner: str,
    request: GenerationRequest,
    fields: Iterable[str],
    batch_key: str | None,
    now: float,
) -> None:
    """Insert a job whose files are in its folder, with a task for each image.

    Args:
        connection: a transaction.
        job_id: the job.
        owner: who submits it.
        request: with the names of files.
        fields: the fields of the request that name these files.
        batch_key: which tasks can run together.
        now: the time.
    """
    if connection.execute(select(owners).where(owners.c.name == owner)).first() is None:
        connection.execute(insert(owners).values(name=owner, turn=0))
    connection.execute(
        insert(jobs).values(
            id=job_id,
            owner=owner,
            status=QUEUED,
            preset="" if request.model is None else request.model.preset,
            batch_key=batch_key,
            request=request.model_dump_json(),
            files=json.dumps(list(fields)),
            waiting=request.num_images,
            turn=next_turn(connection),
            created=now,
            watched=0.0,
            is_service_problem=False,
        )
    )
    rows = [
        {"job_id": job_id, "number": number, "status": QUEUED}
        for number in range(request.num_images)
    ]
    zeros = {"attempt": 0, "interruptions": 0, "step": 0, "total_steps": 0}
    connection.execute(insert(tasks), [{**row, **zeros} for row in rows])


def list_waiting(
    connection: Connection, presets: Collection[str] | None = None
) -> list[WaitingJob]:
    """Return the jobs with images that wait, of some presets or of all."""
    query = (
        select(
            jobs.c.id,
            jobs.c.owner,
            jobs.c.batch_key,
            jobs.c.waiting,
            jobs.c.turn,
            owners.c.turn.label("owner_turn"),
        )
        .join(owners, owners.c.name == jobs.c.owner)
        .where(jobs.c.waiting > 0)
    )
    if presets is not None:
        query = query.where(jobs.c.preset.in_(presets))
    return [
        WaitingJob(row.id, row.owner, row.batch_key, *map(_whole, row[3:]))
        for row in connection.execute(query)
    ]


def begin_task(
    connection: Connection, job: WaitingJob, worker: str, lease: float, now: float
) -> tuple[int, int]:
    """Give the first waiting task of a job to a worker.

    Args:
        connection: a transaction.
        job: the job.
        worker: name of the worker.
        lease: time at which the claim ends.
        now: the time.

    Returns:
        The number of the image and that of the claim.

    Raises:
        StoreError: no task waits, so the record of the job is damaged.
    """
    waiting = (tasks.c.job_id == job.id, tasks.c.status == QUEUED)
    query = select(tasks.c.number, tasks.c.attempt).where(*waiting).order_by(tasks.c.number)
    task = connection.execute(query.limit(1)).first()
    if task is None:
        raise StoreError(DAMAGED)
    turn = next_turn(connection)
    attempt = task.attempt + 1
    connection.execute(
        update(tasks)
        .where(tasks.c.job_id == job.id, tasks.c.number == task.number)
        .values(status=RUNNING, worker=worker, lease=lease, attempt=attempt, step=0)
    )
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job.id)
        .values(
            status=RUNNING,
            turn=turn,
            started=func.coalesce(jobs.c.started, now),
            waiting=_count_tasks(job.id, QUEUED),
        )
    )
    connection.execute(update(owners).where(owners.c.name == job.owner).values(turn=turn))
    return task.number, attempt


def complete_task(connection: Connection, task: Task, width: int, height: int) -> bool:
    """Publish a task; return whether the claim was still valid."""
    values = {
        "status": COMPLETED,
        "width": width,
        "height": height,
        "lease": None,
    }
    return connection.execute(update(tasks).where(is_held(task)).values(**values)).rowcount == 1


def is_published(connection: Connection, task: Task) -> bool:
    """Whether this claim has published its image, as far as the caller did not learn it."""
    published = (
        tasks.c.job_id == task.job_id,
        tasks.c.number == task.index,
        tasks.c.status == COMPLETED,
        tasks.c.attempt == task.attempt,
    )
    return connection.execute(select(tasks.c.number).where(*published)).first() is not None


def requeue(connection: Connection, rows: Iterable[Any], is_interrupted: bool) -> None:
    """Put tasks that run back into the queue.

    Args:
        connection: a transaction.
        rows: with `job_id` and `number` of each task.
        is_interrupted: whether its worker ended. The job then runs alone, since it may be the
            cause.
    """
    for row in rows:
        connection.execute(
            update(tasks)
            .where(tasks.c.job_id == row.job_id, tasks.c.number == row.number)
            .values(
                status=QUEUED,
                worker=None,
                lease=None,
                interruptions=tasks.c.interruptions + int(is_interrupted),
            )
        )
        values: dict[str, Any] = {"waiting": _count_tasks(row.job_id, QUEUED)}
        if is_interrupted:
            values["batch_key"] = None
        connection.execute(update(jobs).where(jobs.c.id == row.job_id).values(**values))


def end_job(
    connection: Connection,
    job_id: str,
    status: JobStatus,
    now: float,
    expires: float,
    problem: str | None = None,
    is_service_problem: bool = False,
) -> None:
    """Give a job its final status; what it still has to do is dropped."""
    connection.execute(
        update(tasks)
        .where(tasks.c.job_id == job_id, tasks.c.status.in_(UNFINISHED))
        .values(status=CANCELLED, lease=None)
    )
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(
            status=status.value,
            finished=now,
            expires=expires,
            problem=problem,
            is_service_problem=is_service_problem,
            waiting=0,
        )
    )


def has_unfinished_tasks(connection: Connection, job_id: str) -> bool:
    """Whether a task of the job waits or runs."""
    unfinished = (tasks.c.job_id == job_id, tasks.c.status.in_(UNFINISHED))
    return (
        connection.execute(select(tasks.c.number).where(*unfinished).limit(1)).first() is not None
    )


def is_held(task: Task) -> ColumnElement[bool]:
    """Return the condition that the claim of a task is valid."""
    return and_(
        tasks.c.job_id == task.job_id,
        tasks.c.number == task.index,
        tasks.c.status == RUNNING,
        tasks.c.attempt == task.attempt,
    )


def is_held_any(claimed: Iterable[Task]) -> ColumnElement[bool]:
    """Return the condition that a row is that of one of these tasks, whose claim is valid."""
    return or_(*map(is_held, claimed))


def next_turn(connection: Connection) -> int:
    """Return a number that is larger than that of any turn before."""
    last_turns = [
        _whole(connection.execute(select(func.max(column))).scalar())
        for column in (jobs.c.turn, owners.c.turn)
    ]
    return max(last_turns) + 1


def _whole(value: Any) -> int:
    """Return a number of a row; 0 for anything else, which SQLite can hold in a damaged row."""
    return value if isinstance(value, int) else 0


def _count_tasks(job_id: str, status: str) -> Any:
    return (
        select(func.count())
        .select_from(tasks)
        .where(tasks.c.job_id == job_id, tasks.c.status == status)
        .scalar_subquery()
    )
