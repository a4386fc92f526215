"""Read JSON files of a benchmark into typed objects; a damaged file is an error in one sentence."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json

from openpulid.errors import OptionError

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""`__pydantic_config__` of the dataclasses that are read."""


def read_json(path: Path, kind: type[T], fix: str, **defaults: Any) -> T:
    """Read a JSON file.

    Args:
        path: the file.
        kind: what it holds: a dataclass, or a type such as dict[str, float].
        fix: what the user can do if the file is damaged.
        defaults: fields that the file may leave out.

    Raises:
        OptionError: the file cannot be read, or holds something else.
    """
    try:
        data = from_json(path.read_bytes(), allow_inf_nan=False)
        if defaults and isinstance(data, dict):
            data = {**defaults, **data}
        return parse(data, kind)
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise OptionError(f"{path} is damaged ({_first_problem(error)}); {fix}.") from None


def parse(data: Any, kind: type[T]) -> T:
    """Build a typed object from JSON data.

    Raises:
        ValueError: the data have other fields or types.
    """
    value: T = _adapter(cast(Hashable, kind)).validate_python(data)
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_problem(error: ValueError) -> str:
    """Return the first problem of a report: the place and what is wrong."""
    if not isinstance(error, ValidationError):
        return str(error).rstrip(".")
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))[:100]
    return f"{place}: {problem['msg']}" if place else problem["msg"]
