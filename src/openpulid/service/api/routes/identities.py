"""Identities: made from reference images once, named in any number of requests."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse

from openpulid.service.api.access import Owner
from openpulid.service.api.bodies import read_body
from openpulid.service.api.context import Context, CountedOwner
from openpulid.service.api.openapi import describe_body
from openpulid.service.api.people import IDENTITY_FIELDS, gather_person, translate_person
from openpulid.service.api.problems import Problem, document
from openpulid.service.jobs import StoredIdentity

router = APIRouter(tags=["identities"])

IDENTITY_ID = re.compile(r"identity-[0-9a-f]{32}")
FILE_TYPE = "application/octet-stream"


class IdentityAnswer(BaseModel):
    """A stored identity."""

    id: str = Field(description="Its name in the field `identity` of a person.")
    object: Literal["identity"] = "identity"
    created_at: int = Field(description="Seconds since 1970, as all times.")
    expires_at: int = Field(description="When the identity is removed.")
    url: str = Field(description="The address of its file, which is biometric data.")


async def find_identity(identity_id: str, owner: Owner, context: Context) -> StoredIdentity:
    """Return an identity of the sender.

    Raises:
        Problem: the sender has no such identity (404).
    """
    stored = None
    if IDENTITY_ID.fullmatch(identity_id):
        stored = await run_in_threadpool(context.backend.identities.get, owner, identity_id)
    if stored is None:
        raise Problem(404, "there is no such identity; it may have been removed.")
    return stored


OwnIdentity = Annotated[StoredIdentity, Depends(find_identity)]


def _describe(stored: StoredIdentity, request: Request) -> IdentityAnswer:
    return IdentityAnswer(
        id=stored.id,
        created_at=int(stored.created.timestamp()),
        expires_at=int(stored.expires.timestamp()),
        url=str(request.url_for("get_identity_file", identity_id=stored.id)),
    )


@router.post(
    "/v1/identities",
    status_code=201,
    response_model=IdentityAnswer,
    responses=document(400, 401, 413, 415, 429, 503),
    openapi_extra=describe_body("IdentityRequest"),
)
async def create_identity(
    request: Request, response: Response, owner: CountedOwner, context: Context
) -> IdentityAnswer:
    """Store the identity of the person in reference images, or in an identity file."""
    body = await read_body(request, context.backend.config.limits.files)
    person = gather_person(body, IDENTITY_FIELDS)
    fields = translate_person(person)
    identity = await context.submitter.identify(owner, person, fields)
    stored = await run_in_threadpool(context.backend.identities.put, owner, identity)
    response.headers["Location"] = str(request.url_for("get_identity", identity_id=stored.id))
    return _describe(stored, request)


@router.get(
    "/v1/identities/{identity_id}",
    response_model=IdentityAnswer,
    responses=document(401, 404, 503),
)
async def get_identity(stored: OwnIdentity, request: Request) -> IdentityAnswer:
    """Return when an identity expires, and where its file is."""
    return _describe(stored, request)


@router.get(
    "/v1/identities/{identity_id}/file",
    response_class=FileResponse,
    responses={
        200: {"description": "The identity file", "content": {FILE_TYPE: {}}},
        **document(401, 404, 503),
    },
)
async def get_identity_file(stored: OwnIdentity) -> FileResponse:
    """Return the identity file, for `pulid generate` or another server."""
    return FileResponse(stored.file, media_type=FILE_TYPE, filename=f"{stored.id}.safetensors")


@router.delete("/v1/identities/{identity_id}", status_code=204, responses=document(401, 404, 503))
async def delete_identity(stored: OwnIdentity, context: Context) -> None:
    """Remove an identity. Jobs that have been accepted with it go on."""
    await run_in_threadpool(context.backend.identities.delete, stored.owner, stored.id)
