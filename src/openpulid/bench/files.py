"""Files of a benchmark: written in one step, and checked when they are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from json import dumps
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from openpulid.errors import OptionError
from openpulid.io.text import decode_text

T = TypeVar("T")


def save_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Save an image in the format of its ending, in one step. Raises as `write_file`."""
    write_file(path, lambda temporary: image.save(temporary, **options))


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one step. Raises as `write_file`."""
    write_text(path, dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text in one step. Raises as `write_file`."""
    # names of files can hold bytes that are no text
    content = text.encode("utf-8", errors="backslashreplace")
    write_file(path, lambda temporary: temporary.write_bytes(content))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name and rename it: it is complete or absent.

    Args:
        path: the file; its folder is created.
        write: writes the content into a file with another name and the same ending.

    Raises:
        OptionError: the file cannot be written; an existing one stays.
    """
    # short, because the name of a person can be long; unique, because threads write as well
    temporary = path.with_name(f".{token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OptionError(
            f"{path} could not be written ({error.strerror or error}); free some disk space, check "
            "that the directory is writable, and run the same command again."
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
