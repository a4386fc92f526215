"""The names of a request's fields in other programs, and options of the answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from openpulid.errors import OptionError, suggest
from openpulid.pipelines.request import GenerationRequest, parse_size
from openpulid.pipelines.request_fields import Name, RequestError, literal, quote
from openpulid.pipelines.request_part import RequestPart
from openpulid.service.api.problems import Problem

ALIASES = {
    # OpenAI
    "n": "num_images",
    # PuLID's own programs, and the services that run them
    "id_weight": "identity.scale",
    "id_scale": "identity.scale",
    "start_step": "identity.start_step",
    "num_zero": "identity.num_zero",
    "true_cfg": "true_cfg_scale",
    "num_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "neg_prompt": "negative_prompt",
    "num_outputs": "num_images",
}
"""Other name of a field -> its path in a `GenerationRequest`."""

OWN_FIELDS = ("resolved", "schema_version")
"""Fields of a `GenerationRequest` that the service sets."""


class AnswerOptions(RequestPart):
    """How images are returned, in OpenAI's fields, and those that have no effect.

    Attributes:
        response_format: the images themselves, or their addresses on this server.
        output_format: of the image files. A PNG file carries its request.
        output_compression: quality of a JPEG or WebP file, from 0 to 100.
        stream: send events while the image is generated.
        partial_images: how many previews a stream sends at most.
        background: OpenAI's; images are always opaque.
        quality: OpenAI's; without effect, as are the following.
        style: see `quality`.
        moderation: see `quality`.
        input_fidelity: see `quality`.
        safety_identifier: see `quality`.
        user: see `quality`.
    """

    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(default=None, ge=0, le=100)
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)
    background: Literal["auto", "opaque"] = "auto"
    quality: Name | None = None
    style: Name | None = None
    moderation: Name | None = None
    input_fidelity: Name | None = None
    safety_identifier: Name | None = None
    user: str | None = Field(default=None, max_length=256)


@dataclass(frozen=True)
class Fields:
    """The fields of a request's body under their own names.

    Attributes:
        data: of a `GenerationRequest`, not validated; without models.
        preset: name of the preset; None for the first one.
        method: name of the method; None for PuLID.
        names: path of a field -> the name that the client used, if it is another one.
    """

    data: dict[str, Any]
    preset: str | None = None
    method: str | None = None
    names: dict[str, str] = field(default_factory=dict)

    def rename(self, error: RequestError) -> Problem:
        """Return an error in the names that the client used."""
        paths = [re.sub(r"\.\d+", "", path) for path in error.fields]
        names = {path: self.names.get(path, path) for path in paths}
        fields = tuple(
            self.names.get(path, path_with_positions)
            for path, path_with_positions in zip(paths, error.fields, strict=True)
        )
        return Problem(400, str(error.rename(names)), fields)


def split_answer_options(body: Mapping[str, Any]) -> tuple[AnswerOptions, dict[str, Any]]:
    """Split a body into the options of the answer and the other fields.

    Raises:
        RequestError: an option of the answer has another value.
    """
    names = AnswerOptions.model_fields
    given = {name: value for name, value in body.items() if name in names and value is not None}
    options = AnswerOptions.model_validate(given)
    if options.output_format == "png" and options.output_compression not in (None, 100):
        raise RequestError(
            "{0} has no effect on PNG images; set {1} to jpeg or webp.",
            "output_compression",
            "output_format",
        )
    return options, {name: value for name, value in body.items() if name not in names}


def translate(
    body: Mapping[str, Any], aliases: Mapping[str, str] = ALIASES, others: Iterable[str] = ()
) -> Fields:
    """Translate the names of other programs into those of a `GenerationRequest`.

    A seed that is left out is drawn, so that each request gives other images.

    Args:
        body: the fields of a request.
        aliases: other name of a field -> its path.
        others: further options of the route, which a misspelled name may mean.

    Raises:
        RequestError: a field is unknown, two fields set one option, or a size or a model is none.
    """
    known = (*list_own_fields(), *OWN_FIELDS, *aliases, "model", "method", "size")
    for name in body:
        if name not in known:
            choices = (*known, *others)
            raise RequestError(f"there is no option {{0}}{literal(suggest(name, choices))}.", name)
    own = {name: value for name, value in body.items() if name not in aliases}
    models = _read_models(own.pop("model", None), own.pop("method", None))
    size = own.pop("size", None)
    for name in OWN_FIELDS:
        if name in own:
            raise RequestError("{0} is set by the service; leave it out.", name)
    data = {"seed": None, **own}
    names: dict[str, str] = {}
    for name, path in aliases.items():
        if body.get(name) is not None:
            _set(data, path, body[name], name)
            names[path] = name
    if size not in (None, "auto"):
        data |= _read_size(size, data)
    return Fields(data, models.get("preset"), models.get("method"), names)


def _read_models(model: Any, method: Any) -> dict[str, str]:
    """Return preset and method; other models are chosen by whoever starts the server."""
    given = {"preset": model} if isinstance(model, str) else model or {}
    if not isinstance(given, Mapping) or not given.keys() <= {"preset", "method"}:
        raise RequestError(
            "{0} must be the name of a preset, or an object with preset and method, got "
            f"{quote(model)}.",
            "model",
        )
    if method is not None:
        given = {**given, "method": method}
    for name, value in given.items():
        if not isinstance(value, (str, type(None))):
            raise RequestError(f"{{0}} must be text, got {quote(value)}.", f"model.{name}")
    return {name: value for name, value in given.items() if value is not None}


def _read_size(value: Any, data: Mapping[str, Any]) -> dict[str, int]:
    if data.get("width") is not None or data.get("height") is not None:
        raise RequestError("set either {0}, or {1} and {2}.", "size", "width", "height")
    try:
        width, height = parse_size(str(value))
    except OptionError as error:
        raise RequestError(f"{{0}}: {literal(str(error))}", "size") from None
    return {"width": width, "height": height}


def _set(data: dict[str, Any], path: str, value: Any, name: str) -> None:
    """Set the option at a path, which may be in a part of the request."""
    *parents, last = path.split(".")
    for parent in parents:
        part = data.get(parent, {})
        if not isinstance(part, Mapping):
            raise RequestError("{0} must be an object.", parent)
        data[parent] = dict(part)
        data = data[parent]
    if data.get(last) is not None:
        raise RequestError("{0} and {1} set the same option; leave one out.", name, path)
    data[last] = value


def list_own_fields() -> list[str]:
    """Return the names of a `GenerationRequest` that a client can set, without models."""
    return [name for name in GenerationRequest.model_fields if name not in (*OWN_FIELDS, "model")]
