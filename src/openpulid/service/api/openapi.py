"""The published schema of the bodies of requests, which the service reads itself."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import MAX_PATH
from openpulid.service.api.bodies import FORM, JSON, JSON_FIELDS
from openpulid.service.api.fal import FalRequest
from openpulid.service.api.fields import ALIASES, OWN_FIELDS, AnswerOptions
from openpulid.service.api.problems import ProblemDetails

REFERENCE = "#/components/schemas/{model}"

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FILE: Schema = {
    "type": "string",
    "minLength": 1,
    "description": "A data: URL in base64, or the name of a file in a form.",
}
BINARY: Schema = {"type": "string", "contentMediaType": "application/octet-stream"}

MODELS: Schema = {
    "model": {
        "anyOf": [
            TEXT,
            {
                "type": "object",
                "properties": {"preset": TEXT, "method": TEXT},
                "additionalProperties": False,
            },
        ],
        "description": "A preset of GET /v1/models; the first one by default.",
    },
    "method": {"type": "string", "description": "A method of the preset; PuLID by default."},
}
SIZE: Schema = {"type": "string", "description": "WIDTHxHEIGHT in pixels, or auto."}
UPLOADS = ("image", "mask", "identity")
"""Fields of a person that are parts of a form in some requests."""


def describe_body(name: str) -> Schema:
    """Return the description of a route's body for its OpenAPI schema.

    Args:
        name: one of `list_bodies`.
    """
    content = {
        kind: {"schema": {"$ref": REFERENCE.format(model=model)}}
        for kind, model in ((JSON, name), (FORM, f"{name}Form"))
    }
    return {"requestBody": {"required": True, "content": content}}


def publish_schema(app: FastAPI) -> None:
    """Add the bodies of requests, and problem details, to the schema of an application."""

    def build() -> Schema:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, summary=app.summary, routes=app.routes
            )
            parts = schema.setdefault("components", {}).setdefault("schemas", {})
            parts |= list_bodies()
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def list_bodies() -> dict[str, Schema]:
    """Return name -> schema of all bodies and their parts."""
    parts: dict[str, Schema] = {}
    for model in (GenerationRequest, AnswerOptions, FalRequest, ProblemDetails):
        parts[model.__name__] = _describe(model, parts)
    parts.pop("ModelSelection")
    fields = parts.pop("GenerationRequest")["properties"]
    fields = {name: schema for name, schema in fields.items() if name not in OWN_FIELDS}
    for alias, path in ALIASES.items():
        *part, name = path.split(".")
        source = parts["IdentityOptions"]["properties"] if part else fields
        fields[alias] = {**source[name], "description": f"Another name of {path}."}
    fields |= {**MODELS, "size": SIZE}
    answer = parts.pop("AnswerOptions")["properties"]
    person = parts["Person"]["properties"]
    faces = {name: person[name] for name in ("face_index", "face_order")}
    sources = {"image": {"anyOf": [FILE, person["images"]]}, **faces}
    bodies = {
        "JobRequest": _object(fields, "prompt"),
        "ImageRequest": _object(fields | answer, "prompt"),
        "ImageEditRequest": _object(fields | answer | sources | {"mask": FILE}, "prompt"),
        "IdentityRequest": _object(sources | {"identity": FILE} | MODELS),
        "FalRequest": parts.pop("FalRequest"),
    }
    return {**parts, **bodies, **{f"{name}Form": _to_form(body) for name, body in bodies.items()}}


def _describe(model: type[BaseModel], parts: dict[str, Schema]) -> Schema:
    """Return the schema of a model, and add those of its parts."""
    schema = _without_paths(model.model_json_schema(ref_template=REFERENCE))
    parts |= schema.pop("$defs", {})
    return schema


def _without_paths(schema: Any) -> Any:
    """Replace paths, which a request never holds, by files."""
    if isinstance(schema, list):
        return [_without_paths(entry) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("maxLength") == MAX_PATH:
        return deepcopy(FILE)
    return {name: _without_paths(entry) for name, entry in schema.items()}


def _object(properties: Schema, *required: str) -> Schema:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(required)} if required else schema


def _to_form(body: Schema) -> Schema:
    """Return the form of a body: objects and lists are JSON, and files are parts of any name."""
    properties = dict(body["properties"])
    for name in properties:
        if name in UPLOADS:
            properties[name] = {"type": "array", "items": BINARY}
        elif name in JSON_FIELDS or name == "model":
            properties[name] = {"type": "string"}
    return {**body, "properties": properties, "additionalProperties": BINARY}
