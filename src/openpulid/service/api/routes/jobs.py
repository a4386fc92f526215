"""Jobs: submitted now, fetched later."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from openpulid.service.api.answers import (
    MEDIA_TYPES,
    ImageFormat,
    JobAnswer,
    describe_job,
    read_image,
)
from openpulid.service.api.bodies import read_body
from openpulid.service.api.context import Context, CountedOwner
from openpulid.service.api.events import EVENT_STREAM, stream_job
from openpulid.service.api.fields import AnswerOptions, translate
from openpulid.service.api.openapi import describe_body
from openpulid.service.api.own_jobs import OwnJob
from openpulid.service.api.problems import Problem, document

router = APIRouter(tags=["jobs"])


async def _answer(job: OwnJob, context: Context, request: Request) -> JobAnswer:
    position = None
    if not job.status.is_final:
        position = await run_in_threadpool(context.backend.jobs.position, job.id)
    return describe_job(job, position, request)


@router.post(
    "/v1/jobs",
    status_code=202,
    response_model=JobAnswer,
    responses=document(400, 401, 413, 415, 429, 503),
    openapi_extra=describe_body("JobRequest"),
)
async def create_job(
    request: Request, response: Response, owner: CountedOwner, context: Context
) -> JobAnswer:
    """Accept a generation. When this answers, the job survives a crash of the machine."""
    body = await read_body(request, context.backend.config.limits.files)
    job = await context.submitter.submit(owner, body, translate(body.data))
    response.headers["Location"] = str(request.url_for("get_job", job_id=job.id))
    return await _answer(job, context, request)


@router.get("/v1/jobs/{job_id}", response_model=JobAnswer, responses=document(401, 404, 503))
async def get_job(job: OwnJob, context: Context, request: Request) -> JobAnswer:
    """Return a job: its place in the queue, its progress, its finished images."""
    return await _answer(job, context, request)


@router.delete("/v1/jobs/{job_id}", response_model=JobAnswer, responses=document(401, 404, 503))
async def cancel_job(job: OwnJob, context: Context, request: Request) -> JobAnswer:
    """End a job after its present step. Its finished images stay until it expires."""
    cancelled = await run_in_threadpool(context.backend.jobs.cancel, job.owner, job.id)
    return await _answer(cancelled or job, context, request)


@router.get(
    "/v1/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {"description": "Server-sent events", "content": {EVENT_STREAM: {}}},
        **document(401, 404, 503),
    },
)
async def follow_job(job: OwnJob, context: Context, request: Request) -> StreamingResponse:
    """Send events: `progress`, `preview` with a small image, and `end` with the job."""
    return StreamingResponse(stream_job(context.follower, request, job), media_type=EVENT_STREAM)


@router.get(
    "/v1/jobs/{job_id}/images/{index}",
    response_class=Response,
    responses={
        200: {
            "description": "The image file",
            "content": {kind: {} for kind in MEDIA_TYPES.values()},
        },
        **document(400, 401, 404, 503),
    },
)
async def get_job_image(
    job: OwnJob,
    index: str,
    request: Request,
    format: ImageFormat = "png",
    compression: Annotated[int | None, Query(ge=0, le=100)] = None,
) -> Response:
    """Return a finished image. A PNG file carries the request that generates it again."""
    image = next((image for image in job.images if str(image.index) == index), None)
    if image is None:
        raise Problem(404, f"this job has no finished image {index}.")
    options = AnswerOptions(output_format=format, output_compression=compression)
    content = await run_in_threadpool(read_image, job, image, options, request)
    return Response(content, media_type=MEDIA_TYPES[format])
