"""OpenAI's image API: a request waits for its images."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from openpulid.service.api.answers import ImagesAnswer, describe_images
from openpulid.service.api.bodies import Body, read_body
from openpulid.service.api.context import ApiContext, Context, CountedOwner
from openpulid.service.api.events import EVENT_STREAM, stream_images
from openpulid.service.api.fields import AnswerOptions, split_answer_options, translate
from openpulid.service.api.openapi import describe_body
from openpulid.service.api.people import (
    EDIT_FIELDS,
    convert_person_mask,
    gather_person,
    rename_person,
)
from openpulid.service.api.problems import document

router = APIRouter(tags=["images"])

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; with `stream`, server-sent events.",
        "content": {EVENT_STREAM: {}},
    },
    **document(400, 401, 409, 413, 415, 429, 503),
}


@router.post(
    "/v1/images/generations",
    response_model=ImagesAnswer,
    response_model_exclude_none=True,
    responses=RESPONSES,
    openapi_extra=describe_body("ImageRequest"),
)
async def create_images(request: Request, owner: CountedOwner, context: Context) -> Any:
    """Generate images, and return them. If the client goes away, the generation ends."""
    body = await read_body(request, context.backend.config.limits.files)
    return await _generate(request, owner, context, body, "image_generation")


@router.post(
    "/v1/images/edits",
    response_model=ImagesAnswer,
    response_model_exclude_none=True,
    responses=RESPONSES,
    openapi_extra=describe_body("ImageEditRequest"),
)
async def edit_images(request: Request, owner: CountedOwner, context: Context) -> Any:
    """Generate images of the person in the reference images, and return them.

    The mask says where in the result the person may be: it is transparent there, as in OpenAI's
    API, or white.
    """
    body = await read_body(request, context.backend.config.limits.files)
    convert = None
    if not body.data.get("people"):  # their masks are as in a generation
        convert = partial(convert_person_mask, limits=context.backend.config.limits)
    body = gather_person(body, EDIT_FIELDS)
    return await _generate(request, owner, context, body, "image_edit", convert)


async def _generate(
    request: Request,
    owner: str,
    context: ApiContext,
    body: Body,
    kind: str,
    convert: partial[None] | None = None,
) -> ImagesAnswer | Response:
    options, data = split_answer_options(body.data)
    fields = translate(data, others=AnswerOptions.model_fields)
    if kind == "image_edit":
        fields.names.update(rename_person(EDIT_FIELDS))
    job = await context.submitter.submit(owner, body, fields, convert)
    if options.stream:
        events = stream_images(context.follower, request, job, options, kind)
        return StreamingResponse(events, media_type=EVENT_STREAM)
    job = await context.follower.wait(request, job)
    return await run_in_threadpool(describe_images, job, options, request)
