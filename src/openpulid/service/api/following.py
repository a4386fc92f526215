"""Follow a job until it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from anyio import CancelScope
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from openpulid.service.jobs import Job
from openpulid.service.store.jobs import JobStore

POLL_SECONDS = 0.05
"""The shortest time between two looks at a job."""

READS_PER_SECOND = 400
"""The most looks at jobs of all followers together, so that many waiting clients cost little."""

WATCH_SECONDS = 10.0
"""For how long previews are asked for at once."""


class Follower:
    """Reads jobs again and again: the queue may be served by other processes.

    Args:
        jobs: the queue.
    """

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._num_followed = 0

    async def follow(
        self, request: Request, owner: str, job_id: str, has_previews: bool = False
    ) -> AsyncGenerator[Job, None]:
        """Yield a job at once and then again and again, until it has ended or the client is gone.

        Args:
            request: whose client waits.
            owner: of the job.
            job_id: the job.
            has_previews: ask for previews.
        """
        loop = asyncio.get_running_loop()
        watched_until = 0.0
        self._num_followed += 1
        try:
            while (job := await run_in_threadpool(self._jobs.get, owner, job_id)) is not None:
                yield job
                if job.status.is_final or await request.is_disconnected():
                    return
                if has_previews and loop.time() > watched_until - WATCH_SECONDS / 2:
                    await run_in_threadpool(self._jobs.watch, job_id, WATCH_SECONDS)
                    watched_until = loop.time() + WATCH_SECONDS
                await asyncio.sleep(max(POLL_SECONDS, self._num_followed / READS_PER_SECOND))
        finally:
            self._num_followed -= 1

    async def follow_to_end(
        self, request: Request, job: Job, has_previews: bool = False
    ) -> AsyncGenerator[Job, None]:
        """Yield a job as `follow` does, and cancel it if the client goes away before its end."""
        try:
            async with aclosing(self.follow(request, job.owner, job.id, has_previews)) as states:
                async for job in states:
                    yield job
        finally:
            if not job.status.is_final:
                with CancelScope(shield=True):
                    await run_in_threadpool(self._jobs.cancel, job.owner, job.id)

    async def wait(self, request: Request, job: Job) -> Job:
        """Return a job when it has ended, and cancel it if the client goes away before that.

        Raises:
            ClientDisconnect: the client has gone away.
        """
        async with aclosing(self.follow_to_end(request, job)) as states:
            async for state in states:
                job = state
        if not job.status.is_final:
            raise ClientDisconnect
        return job
