"""JSON files of a benchmark, checked when they are read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from openpulid.errors import OptionError
from openpulid.io.text import decode_text

T = TypeVar("T")


def read_json(kind: type[T], path: Path, advice: str) -> T:
    """Read a JSON file as a dataclass or another type, with all values checked.

    Args:
        kind: the type.
        path: the file.
        advice: what to do with a file that is damaged; ends the error message.

    Raises:
        OptionError: the file cannot be read, or has other values than the type.
    """
    try:
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror or error}); {advice}") from None
    try:
        return parse_json(kind, text)
    except OptionError as error:
        raise OptionError(f"{path} is not valid ({error}); {advice}") from None


def parse_json(kind: type[T], text: str) -> T:
    """Build a dataclass or another type from JSON, with all values checked.

    Raises:
        OptionError: names the values that do not fit the type.
    """
    try:
        adapter: TypeAdapter[T] = _type_adapter(kind)  # type: ignore[arg-type]
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        raise OptionError(describe_problems(error)) from None


@cache
def _type_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # takes longer to build than a record to read


def describe_problems(error: ValidationError, limit: int = 3) -> str:
    """Describe the first problems that pydantic reports: "seeds.0: input should be ..."."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False)[:limit]:
        field = ".".join(map(str, problem["loc"]))
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        problems.append(f"{field}: {message}" if field else message)
    return "; ".join(problems)
