"""What happens to a job, as server-sent events: the service's own, and those of OpenAI's API."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from io import BytesIO

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from PIL import Image
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from openpulid.io.metadata import encode_image
from openpulid.service.api.answers import (
    SUFFIXES,
    ImageFormat,
    describe_job,
    read_image,
    to_problem,
)
from openpulid.service.api.fields import AnswerOptions
from openpulid.service.api.following import Follower
from openpulid.service.jobs import Job, JobStatus

EVENT_STREAM = "text/event-stream"

PING_SECONDS = 15.0
"""After so long without an event, a comment keeps proxies from closing the connection."""


class ProgressEvent(BaseModel):
    """The state of a job that has not ended."""

    status: JobStatus
    step: int
    total_steps: int
    images: int


class PreviewEvent(BaseModel):
    """A small image of what the last step gave."""

    image: str


class PartialImageEvent(BaseModel):
    """OpenAI's event with a preview."""

    type: str
    b64_json: str
    created_at: int
    size: str = "auto"
    quality: str = "auto"
    background: str = "opaque"
    output_format: ImageFormat
    partial_image_index: int


class CompletedImageEvent(BaseModel):
    """OpenAI's event with a finished image."""

    type: str
    b64_json: str
    created_at: int
    size: str
    quality: str = "auto"
    background: str = "opaque"
    output_format: ImageFormat
    seed: int


def _event(name: str, data: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=data.model_dump_json())


class _Previews:
    """Tells whether a job has a new preview."""

    def __init__(self) -> None:
        self._version: int | None = None

    def read_new(self, job: Job) -> bytes | None:
        """Return the content of a new preview, a JPEG file; None if there is none."""
        if job.preview is None:
            return None
        try:
            version = job.preview.stat().st_mtime_ns
            if version == self._version:
                return None
            self._version = version
            return job.preview.read_bytes()
        except FileNotFoundError:  # the job has ended in between
            return None


async def stream_job(follower: Follower, request: Request, job: Job) -> AsyncGenerator[bytes, None]:
    """Yield the events of a job: `progress`, `preview`, and `end` with the job itself.

    Args:
        follower: reads the job.
        request: whose client waits; the job goes on if the client goes away.
        job: the job.
    """
    previews = _Previews()
    last: ProgressEvent | None = None
    last_time = time.monotonic()
    async with aclosing(follower.follow(request, job.owner, job.id, has_previews=True)) as states:
        async for job in states:
            state = ProgressEvent(
                status=job.status,
                step=job.step,
                total_steps=job.total_steps,
                images=len(job.images),
            )
            if job.status.is_final:
                yield _event("end", describe_job(job, None, request))
                return
            if state != last:
                last = state
                last_time = time.monotonic()
                yield _event("progress", state)
            preview = await run_in_threadpool(previews.read_new, job)
            if preview is not None:
                image = f"data:image/jpeg;base64,{b64encode(preview).decode()}"
                yield _event("preview", PreviewEvent(image=image))
            if time.monotonic() - last_time > PING_SECONDS:
                last_time = time.monotonic()
                yield KEEPALIVE_COMMENT


async def stream_images(
    follower: Follower, request: Request, job: Job, options: AnswerOptions, kind: str
) -> AsyncGenerator[bytes, None]:
    """Yield OpenAI's events: previews, and each image as soon as it is finished.

    Args:
        follower: reads the job.
        request: whose client waits; the job is cancelled if the client goes away.
        job: the job.
        options: format of the images, and the number of previews.
        kind: "image_generation" or "image_edit", with which the names of events begin.
    """
    previews = _Previews()
    sent: set[int] = set()
    num_previews = 0
    last_time = time.monotonic()
    has_previews = options.partial_images > 0
    async with aclosing(follower.follow_to_end(request, job, has_previews)) as states:
        async for job in states:
            created = int(job.created.timestamp())
            for image in [image for image in job.images if image.index not in sent]:
                content = await run_in_threadpool(read_image, job, image, options, request)
                completed = CompletedImageEvent(
                    type=f"{kind}.completed",
                    b64_json=b64encode(content).decode(),
                    created_at=created,
                    size=f"{image.width}x{image.height}",
                    output_format=options.output_format,
                    seed=image.seed,
                )
                sent.add(image.index)
                last_time = time.monotonic()
                yield _event(completed.type, completed)
            if num_previews < options.partial_images and not job.status.is_final:
                preview = await run_in_threadpool(previews.read_new, job)
                if preview is not None:
                    partial = PartialImageEvent(
                        type=f"{kind}.partial_image",
                        b64_json=b64encode(_convert(preview, options)).decode(),
                        created_at=created,
                        output_format=options.output_format,
                        partial_image_index=num_previews,
                    )
                    num_previews += 1
                    yield _event(partial.type, partial)
            if time.monotonic() - last_time > PING_SECONDS:
                last_time = time.monotonic()
                yield KEEPALIVE_COMMENT
    if job.status.is_final and job.status is not JobStatus.COMPLETED:
        yield _event("error", to_problem(job).details)


def _convert(preview: bytes, options: AnswerOptions) -> bytes:
    return encode_image(Image.open(BytesIO(preview)), SUFFIXES[options.output_format])
