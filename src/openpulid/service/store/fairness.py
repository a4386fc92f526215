"""Who is next: owners take turns, and within an owner jobs take turns."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class WaitingJob:
    """A job with images that nobody has begun.

    Attributes:
        id: the job.
        owner: who submitted it.
        batch_key: its images can run in one batch with those of equal keys; None: each runs alone.
        waiting: number of such images.
        turn: when the job was served last, as the number of a turn; at first, when it was
            submitted. So neither a large old job nor a stream of small new ones waits for ever.
        owner_turn: when a job of its owner was served last.
    """

    id: str
    owner: str
    batch_key: str | None
    waiting: int
    turn: int
    owner_turn: int


def fair_order(jobs: Iterable[WaitingJob]) -> Iterator[WaitingJob]:
    """Yield the jobs in the order in which their images are served, once for each image.

    The owner who has not been served for the longest time is next, with the job that has not been
    served for the longest time.
    """
    queues: dict[str, list[tuple[int, str, int, WaitingJob]]] = {}
    owner_turns: dict[str, int] = {}
    last_turn = 0
    for job in jobs:
        queues.setdefault(job.owner, []).append((job.turn, job.id, job.waiting, job))
        owner_turns[job.owner] = job.owner_turn
        last_turn = max(last_turn, job.turn, job.owner_turn)
    for queue in queues.values():
        heapq.heapify(queue)
    owners = [(turn, owner) for owner, turn in owner_turns.items()]
    heapq.heapify(owners)
    while owners:
        _, owner = heapq.heappop(owners)
        queue = queues[owner]
        _, identifier, waiting, job = heapq.heappop(queue)
        yield job
        last_turn += 1
        if waiting > 1:
            heapq.heappush(queue, (last_turn, identifier, waiting - 1, job))
        if queue:
            heapq.heappush(owners, (last_turn, owner))


def choose_batch(jobs: Iterable[WaitingJob], limit: int) -> list[WaitingJob]:
    """Return the jobs of the next batch, once for each image of it.

    Args:
        jobs: all jobs that wait.
        limit: the most images of a batch.
    """
    jobs = list(jobs)
    first = next(fair_order(jobs), None)
    if first is None:
        return []
    if first.batch_key is None:
        return [first]
    alike = (job for job in jobs if job.batch_key == first.batch_key)
    return [job for job, _ in zip(fair_order(alike), range(limit), strict=False)]


def count_before(jobs: Iterable[WaitingJob], job_id: str) -> int | None:
    """Return how many images are served before the first one of a job.

    Returns:
        The number; None if the job does not wait.
    """
    for count, job in enumerate(fair_order(jobs)):
        if job.id == job_id:
            return count
    return None
