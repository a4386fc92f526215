"""The job that a request names, if it is one of its sender."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends
from starlette.concurrency import run_in_threadpool

from openpulid.service.api.access import Owner
from openpulid.service.api.context import Context
from openpulid.service.api.problems import Problem
from openpulid.service.jobs import Job

JOB_ID = re.compile(r"job-[0-9a-f]{32}")


async def find_job(job_id: str, owner: Owner, context: Context) -> Job:
    """Return a job of the sender.

    Raises:
        Problem: the sender has no such job (404).
    """
    jobs = context.backend.jobs
    job = None
    if JOB_ID.fullmatch(job_id):
        job = await run_in_threadpool(jobs.get, owner, job_id)
    if job is None:
        raise Problem(404, "there is no such job; it may have been removed.")
    return job


OwnJob = Annotated[Job, Depends(find_job)]
"""A parameter of a route."""
