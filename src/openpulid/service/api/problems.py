"""Errors of a request as problem details (RFC 9457), in the sentences of the command line.

OpenAI's clients read the member `error`, which is next to the standard's members.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from openpulid.errors import (
    OutputError,
    PulidError,
    StoreError,
    escape_unprintable,
    is_out_of_memory,
)
from openpulid.pipelines.request_fields import RequestError

MEDIA_TYPE = "application/problem+json"

UNEXPECTED = "an unexpected error; the log of the server shows it."
NO_STORAGE = "the service cannot read or write its files now; try again later."
NO_MEMORY = "the service has too little memory for the request now; try again later."

CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "not_finished",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    503: "unavailable",
}
"""Status -> what programs compare."""

RETRY_LATER = {"Retry-After": "60"}
"""Headers of an answer that the service may give differently in a minute."""

logger = logging.getLogger(__name__)


class OpenAIError(BaseModel):
    """The same error in the form of OpenAI's API."""

    message: str
    type: str
    param: str | None
    code: str


class ProblemDetails(BaseModel):
    """An error, see RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="One sentence that names the problem and the fix.")
    fields: list[str] = Field(description="Fields of the request that the sentence names.")
    error: OpenAIError


class Problem(Exception):
    """An error that is answered with problem details.

    Args:
        status: of HTTP.
        detail: one sentence that names the problem and the fix.
        fields: paths of the fields it names, such as `people.0.images`.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        fields: tuple[str, ...] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = escape_unprintable(detail)
        self.fields = tuple(map(escape_unprintable, fields))
        self.headers = dict(headers or {})

    @property
    def details(self) -> ProblemDetails:
        """The problem details."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = OpenAIError(
            message=self.detail,
            type=kind,
            param=self.fields[0] if self.fields else None,
            code=CODES.get(self.status, "internal_error"),
        )
        return ProblemDetails(
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=self.detail,
            fields=list(self.fields),
            error=error,
        )

    def to_response(self) -> JSONResponse:
        """Return the HTTP response."""
        return JSONResponse(self.details.model_dump(), self.status, self.headers, MEDIA_TYPE)


def to_problem(error: Exception) -> Problem:
    """Turn any error of a request into a problem.

    Errors of the user have status 400. A full disk, a database that does not answer and a lack of
    memory are the server's.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestError):
        return Problem(400, str(error), error.fields)
    if isinstance(error, ClientDisconnect):  # nobody reads the answer
        return Problem(400, "the connection was closed before the request was complete.")
    if isinstance(error, RecursionError):
        return Problem(400, "the request is nested too deeply.")
    if is_out_of_memory(error):
        logger.error("%s", error)
        return Problem(503, NO_MEMORY, headers=RETRY_LATER)
    if isinstance(error, StoreError):  # its sentence names no path
        return Problem(503, str(error), headers=RETRY_LATER)
    if isinstance(error, (OutputError, OSError)):
        logger.error("%s", error)
        return Problem(503, NO_STORAGE, headers=RETRY_LATER)
    if isinstance(error, PulidError):
        return Problem(400, str(error))
    return Problem(500, UNEXPECTED)


def handle_errors(app: FastAPI) -> None:
    """Answer every error of an application with problem details."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        return to_problem(error).to_response()

    def answer_http(request: Request, error: HTTPException) -> JSONResponse:
        sentence = {
            404: f"there is no resource {request.url.path}.",
            405: f"{request.method} is not possible for {request.url.path}.",
        }.get(error.status_code, f"{str(error.detail).rstrip('.')}.")
        return Problem(error.status_code, sentence, headers=error.headers).to_response()

    def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][1:])) or "body"
        return Problem(400, f"{name}: {first['msg']}.", (name,)).to_response()

    # all but the last one are expected: they are not logged with a traceback
    expected = (Problem, PulidError, ClientDisconnect, OSError, MemoryError, RecursionError)
    for kind in (*expected, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, answer_invalid)  # type: ignore[arg-type]


def document(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of error responses for a route's OpenAPI schema."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in statuses
    }
