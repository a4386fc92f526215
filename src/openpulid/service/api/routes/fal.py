"""PuLID for FLUX as fal and Replicate offer it."""

from __future__ import annotations

from base64 import b64encode

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from openpulid.service.api.answers import MEDIA_TYPES, image_url, read_image, require_completed
from openpulid.service.api.bodies import read_body
from openpulid.service.api.context import Context, CountedOwner
from openpulid.service.api.fal import FalAnswer, FalImage, FalRequest
from openpulid.service.api.openapi import describe_body
from openpulid.service.api.problems import document
from openpulid.service.jobs import Job

router = APIRouter(tags=["fal"])


@router.post(
    "/fal-ai/flux-pulid",
    response_model=FalAnswer,
    responses=document(400, 401, 409, 413, 415, 429, 503),
    openapi_extra=describe_body("FalRequest"),
)
async def create_fal_images(request: Request, owner: CountedOwner, context: Context) -> FalAnswer:
    """Generate images of a person. If the client goes away, the generation ends."""
    body = await read_body(request, context.backend.config.limits.files)
    fal = FalRequest.model_validate(body.data)
    job = await context.submitter.submit(owner, body, fal.to_fields())
    job = await context.follower.wait(request, job)
    return await run_in_threadpool(_answer, job, fal, request)


def _answer(job: Job, fal: FalRequest, request: Request) -> FalAnswer:
    require_completed(job)
    options = fal.to_answer_options()
    kind = MEDIA_TYPES[options.output_format]
    images = []
    for image in job.images:
        url = image_url(job, image, request, options)
        if fal.sync_mode:
            content = read_image(job, image, options, request)
            url = f"data:{kind};base64,{b64encode(content).decode()}"
        images.append(FalImage(url=url, width=image.width, height=image.height, content_type=kind))
    started, finished = job.started or job.created, job.finished or job.created
    return FalAnswer(
        images=images,
        timings={"inference": (finished - started).total_seconds()},
        seed=job.request.seed,
        prompt=fal.prompt,
    )
