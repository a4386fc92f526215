"""What the parts of the service say to each other about jobs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path

from openpulid.errors import PulidError, StoreError, is_out_of_memory
from openpulid.pipelines.request import GenerationRequest


class JobStatus(str, Enum):
    """Where a job is; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing changes any more."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


@dataclass(frozen=True)
class JobImage:
    """A finished image of a job.

    Attributes:
        index: its number in the job, from 0.
        seed: the seed that regenerates it alone.
        width, height: pixels.
        file: a PNG file; None if it is missing.
    """

    index: int
    seed: int
    width: int
    height: int
    file: Path | None


@dataclass(frozen=True)
class Job:
    """One `GenerationRequest` of one owner.

    Attributes:
        id: "job-" and random characters.
        owner: name of the API key that submitted it.
        status: where it is.
        request: its input files are names within the job's folder.
        images: the finished images, in the order of their indices.
        step: steps that are done, of all images together.
        total_steps: steps of all images; 0 until the first step is reported.
        created: when it was submitted (UTC, as all times).
        started: when its first image was begun.
        finished: when it got its final status.
        expires: when it is removed; None until it is finished.
        preview: a small JPEG file of an image that is not finished yet.
        problem: why it failed, in one sentence.
        is_service_problem: whether that is the fault of the service, not of the request.
    """

    id: str
    owner: str
    status: JobStatus
    request: GenerationRequest
    images: tuple[JobImage, ...]
    step: int
    total_steps: int
    created: datetime
    started: datetime | None = None
    finished: datetime | None = None
    expires: datetime | None = None
    preview: Path | None = None
    problem: str | None = None
    is_service_problem: bool = False


@dataclass(frozen=True)
class Task:
    """One image of a job, claimed by a worker: the unit of batches and of fairness.

    Attributes:
        job_id: the job.
        index: number of the image in the job, from 0.
        owner: name of the API key that submitted the job.
        request: of this image alone: `seed` is that of the image, `num_images` is 1. Its input
            files are absolute paths in the job's folder.
        attempt: how many times the image has been claimed. A result of an earlier claim is not
            published.
    """

    job_id: str
    index: int
    owner: str
    request: GenerationRequest
    attempt: int


@dataclass(frozen=True)
class Output:
    """The image of a task.

    Attributes:
        content: of a PNG file.
        width, height: pixels.
    """

    content: bytes
    width: int
    height: int


@dataclass(frozen=True)
class StoredIdentity:
    """An identity that an owner can name in requests.

    Attributes:
        id: "identity-" and random characters.
        owner: name of the API key that created it.
        created: when it was created (UTC).
        expires: when it is removed (UTC).
        file: the identity file.
    """

    id: str
    owner: str
    created: datetime
    expires: datetime
    file: Path


def is_service_problem(error: PulidError) -> bool:
    """Whether an error is the fault of the service, which may run the same request later."""
    return isinstance(error, StoreError) or is_out_of_memory(error)
