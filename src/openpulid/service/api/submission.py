"""From the body of a request to a job in the queue, or to an identity."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from openpulid.errors import QueueFullError
from openpulid.identity.identity import Identity
from openpulid.pipelines.request_fields import RequestError
from openpulid.service.api.acceptance import Convert, accept
from openpulid.service.api.backend import Backend
from openpulid.service.api.bodies import Body
from openpulid.service.api.fields import Fields
from openpulid.service.api.identification import identify
from openpulid.service.api.rates import too_many
from openpulid.service.jobs import Job

Outcome = TypeVar("Outcome")


class Submitter:
    """Checks requests, and puts them into the queue.

    Args:
        backend: the queue.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        # decoding uses a processor; more at once would only need more memory
        processors = os.cpu_count() or 1
        self._limiter = CapacityLimiter(processors)
        # loading face models takes seconds, in which jobs are still accepted
        self._identity_limiter = CapacityLimiter(processors)

    async def submit(
        self, owner: str, body: Body, fields: Fields, convert: Convert | None = None
    ) -> Job:
        """Accept a job. When this returns, it survives a crash of the machine.

        Args:
            owner: name of the API key.
            body: has the files.
            fields: those of the body under their own names.
            convert: changes the files before they are read.

        Raises:
            Problem: the request is invalid (400), or too many jobs wait (429).
            PulidError: a file of the request cannot be used.
        """

        def run(parts: dict[str, bytes]) -> Job:
            accepted = accept(self._backend, owner, fields, parts, convert)
            job = self._backend.jobs.submit(
                owner, accepted.request, accepted.files, accepted.batch_key
            )
            self._backend.wake()
            return job

        return await self._run(run, body, fields, self._limiter)

    async def identify(self, owner: str, body: Body, fields: Fields) -> Identity:
        """Return the identity of the person of a request, see `submit`."""

        def run(parts: dict[str, bytes]) -> Identity:
            accepted = accept(self._backend, owner, fields, parts)
            return identify(self._backend.engine, accepted.request, accepted.files)

        return await self._run(run, body, fields, self._identity_limiter)

    async def _run(
        self,
        run: Callable[[dict[str, bytes]], Outcome],
        body: Body,
        fields: Fields,
        limiter: CapacityLimiter,
    ) -> Outcome:
        """Run a function in a thread, with the files of a form."""
        limit = self._backend.config.limits.file_bytes
        parts = {name: await file.read(limit + 1) for name, file in body.parts.items()}
        try:
            return await to_thread.run_sync(run, parts, limiter=limiter)
        except RequestError as error:
            raise fields.rename(error) from None
        except QueueFullError as error:
            raise too_many(str(error).partition(";")[0]) from None
