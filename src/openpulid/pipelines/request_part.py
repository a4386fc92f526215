"""The base of a request and its parts, and errors in plain sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from openpulid.errors import suggest
from openpulid.pipelines.request_fields import RequestError, quote

MOST_PROBLEMS = 5
"""Problems of a request that one message names."""


def _translate(error: ValidationError, names: list[str]) -> RequestError:
    """Turn pydantic's report into one sentence per problem."""
    sentences = []
    fields: list[str] = []
    for problem in error.errors()[:MOST_PROBLEMS]:
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, RequestError):
            location = [str(part) for part in problem["loc"]]
            template = cause.template
            # a check of one value does not know its name
            paths = [".".join([*location, field] if field else location) for field in cause.fields]
        else:
            template = _sentence(problem, names)
            paths = [".".join(map(str, problem["loc"]))]
        sentences.append(_shift_placeholders(template, len(fields)).rstrip("."))
        fields += paths
    return RequestError("; ".join(sentences) + ".", *fields)


def _shift_placeholders(template: str, offset: int) -> str:
    """Renumber `{0}`, `{1}`, ... of a sentence that follows others with `offset` fields."""
    return re.sub(r"(?<!{){(\d)}", lambda match: f"{{{int(match[1]) + offset}}}", template)


def _sentence(problem: Mapping[str, Any], names: list[str]) -> str:
    limits = problem.get("ctx", {})
    kind = problem["type"]
    got = f", got {quote(problem.get('input'))}."
    if kind == "json_invalid":
        return "the request is not valid JSON."
    if kind == "extra_forbidden":
        name = str(problem["loc"][-1])
        if name == "size":
            return "there is no option {0}; use width and height."
        if name in ("mask", "face_index", "face_order") and len(problem["loc"]) == 1:
            return "{0} belongs to a person; use people=[Person(images=[...], {0}=...)]."
        return "there is no option {0}" + suggest(name, names) + "."
    if kind == "missing":
        return "{0} is missing."
    if kind in ("greater_than_equal", "less_than_equal"):
        low, high = limits.get("ge"), limits.get("le")
        bound = f"at least {low}" if low is not None else f"at most {high}"
        return "{0} must be " + bound.removesuffix(".0") + got
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", limits["expected"])
        similar = suggest(problem.get("input"), choices)
        return "{0} must be " + limits["expected"] + got.removesuffix(".") + similar + "."
    if kind == "string_too_short":
        return "{0} must not be empty."
    if kind in ("string_too_long", "too_long"):
        unit = "characters" if kind == "string_too_long" else "entries"
        return f"{{0}} must have at most {limits['max_length']} {unit}."
    if kind == "string_unicode":
        return "{0} is not valid UTF-8 text."
    if kind == "string_type":
        return "{0} must be text" + got
    if kind == "tuple_type":
        return "{0} must be a list" + got
    if kind.startswith("int"):
        return "{0} must be a whole number" + got
    if kind.startswith(("float", "finite")):
        return "{0} must be a number" + got
    return "{0}: " + quote(problem["msg"]).strip("'\"") + got


def _field_names(part: type[RequestPart]) -> list[str]:
    """Return the names of the fields of a part and of the parts in it."""
    names = list(part.model_fields)
    for field in part.model_fields.values():
        kinds = [field.annotation]
        while kinds:
            kind = kinds.pop()
            if isinstance(kind, type) and issubclass(kind, RequestPart):
                names += _field_names(kind)
            kinds += get_args(kind)
    return names


@contextmanager
def _plain_errors(part: type[RequestPart]) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise _translate(error, _field_names(part)) from None


Part = TypeVar("Part", bound="RequestPart")


class RequestPart(BaseModel):
    """Base of a request and its parts: frozen, without unknown fields.

    The fields of a part can be given in order, required ones first, as in
    `Control("control-pose", "pose.png")`.

    Attributes:
        files: names of the fields that can name a file.

    Raises:
        RequestError: a field is unknown, missing or out of range.
    """

    files: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    def __init__(self, *args: Any, **data: Any) -> None:
        fields = type(self).model_fields
        names = sorted(fields, key=lambda name: not fields[name].is_required())
        if len(args) > len(names):
            raise RequestError(f"expected at most {len(names)} values, got {len(args)}.")
        positional = dict(zip(names, args, strict=False))
        if repeated := [name for name in positional if name in data]:
            raise RequestError("{0} is given twice.", repeated[0])
        with _plain_errors(type(self)):
            super().__init__(**positional, **data)

    # Tells pydantic that validation of nested parts need not call __init__: errors of a nested
    # part then keep their path in the whole request.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls: type[Part], obj: Any, **options: Any) -> Part:
        """Build from a mapping. Raises RequestError."""
        with _plain_errors(cls):
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls: type[Part], json_data: Any, **options: Any) -> Part:
        """Build from JSON. Raises RequestError."""
        with _plain_errors(cls):
            return super().model_validate_json(json_data, **options)

    def input_files(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """Yield the path of every field that can name a file, and what it names.

        The presets and published weights among them are names, not files.

        Args:
            prefix: path of this part in the request, with a dot at its end.
        """
        for name in type(self).model_fields:
            value = getattr(self, name)
            entries = {f"{prefix}{name}": value}
            if isinstance(value, tuple):
                entries = {f"{prefix}{name}.{number}": entry for number, entry in enumerate(value)}
            for path, entry in entries.items():
                if isinstance(entry, RequestPart):
                    yield from entry.input_files(f"{path}.")
                elif name in self.files and entry:
                    yield path, entry
