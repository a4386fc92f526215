"""The body of a request: JSON, or a form with files."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile

from openpulid.pipelines.request_fields import RequestError
from openpulid.service.api.problems import Problem

JSON = "application/json"
FORM = "multipart/form-data"

MAX_FORM_FIELDS = 200
MAX_FORM_TEXT = 2**20
"""Bytes of one field of a form that is not a file."""

JSON_FIELDS = (
    "people",
    "identity",
    "init_image",
    "controls",
    "loras",
    "embeddings",
    "style_image",
    "refine_faces",
)
"""Fields of a form that are written as JSON."""

MEMBER = re.compile(r"(\w+)\[(\w+)\]")
"""A member of an object in a form, such as `identity[scale]`, as OpenAI's client writes it."""


@dataclass(frozen=True)
class Body:
    """The fields of a request, and the files that are uploaded with it.

    Attributes:
        data: the fields.
        parts: name of a part of the form -> its file. If several files have one name, the names get
            numbers: `image`, `image-2`, `image-3`.
    """

    data: dict[str, Any]
    parts: Mapping[str, UploadFile] = field(default_factory=dict)


async def read_body(request: Request, max_files: int) -> Body:
    """Read the body of a request.

    Args:
        request: with a body in JSON, or with a form.
        max_files: files of a form.

    Raises:
        Problem: the body is of another kind (415), or malformed (400).
        RequestError: a field of a form is malformed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        return await _read_form(request, max_files)
    if kind != JSON:
        raise Problem(415, f"send the request as {JSON} or {FORM}.")
    try:
        data = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Problem(400, "the request is not valid JSON.") from None
    if not isinstance(data, dict):
        raise Problem(400, "the request must be a JSON object.")
    return Body(data)


async def _read_form(request: Request, max_files: int) -> Body:
    form = await request.form(
        max_files=max_files, max_fields=MAX_FORM_FIELDS, max_part_size=MAX_FORM_TEXT
    )
    data: dict[str, Any] = {}
    parts: dict[str, UploadFile] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, UploadFile):
            parts[_number(name, parts)] = value
        elif match := MEMBER.fullmatch(name):
            part = data.setdefault(match[1], {})
            if not isinstance(part, dict):
                raise RequestError("{0} is given twice.", match[1])
            part[match[2]] = value
        elif name in data:
            raise RequestError("{0} is given twice.", name)
        else:
            data[name] = _read_json(name, value) if name in JSON_FIELDS else value
    return Body(data, parts)


def _read_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError("{0} must be JSON in a form.", name) from None


def _number(name: str, names: Container[str]) -> str:
    number = 1
    candidate = name
    while candidate in names:
        number += 1
        candidate = f"{name}-{number}"
    return candidate
