"""Types and limits of the fields of a request, and the error that names fields."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema

from openpulid.errors import OptionError

LONGEST_QUOTE = 60

# The largest values of a request, which may come from another person's image or over the network.
MAX_SEED = 2**64 - 1
"""The largest seed of PyTorch's generators."""
MAX_RANDOM_SEED = 2**32 - 1
MAX_IMAGES = 1000
MAX_SIDE = 4096
"""Pixels. A preset has limits of its own, see `ModelSet`."""
MAX_STEPS = 1000
"""The steps of the noise schedule; more would repeat them."""
MAX_SCALE = 5.0
"""The largest identity scale of PuLID's demo."""
MAX_LORA_SCALE = 10.0
MAX_GUIDANCE = 100.0
MAX_PROMPT = 10_000
"""Characters of a prompt."""
MAX_PATH = 4096
MAX_COUNT = 10_000
MAX_FILES = 64
MAX_PEOPLE = 8
MAX_CONTROLS = 8

FaceOrder = Literal[
    "large-small", "small-large", "left-right", "right-left", "top-bottom", "bottom-top"
]

ResizeMode = Literal["crop", "pad", "stretch"]

DEFAULT_FACE_ORDER: FaceOrder = "large-small"


def _check_path(value: Any) -> str:
    """Return a path as text; unlike pydantic's own text, it may have bytes that are not UTF-8."""
    if isinstance(value, os.PathLike):
        value = os.fsdecode(value)
    if not isinstance(value, str):
        raise RequestError(f"{{0}} must be the path of a file, got {quote(value)}.", "")
    if not value:
        raise RequestError("{0} must not be empty.", "")
    if "\0" in value or len(value) > MAX_PATH:
        raise RequestError(f"{{0}} is not a path: {quote(value)}.", "")
    return value


def _parse_seed(value: Any) -> Any:
    """Draw a seed for "random", None and -1, which stand for one in other programs."""
    if value is None:
        return secrets.randbelow(MAX_RANDOM_SEED + 1)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pydantic refuses integers above 2**63 that are floats
    if isinstance(value, bool):
        raise RequestError("{0} must be a whole number, got true or false.", "")
    if hasattr(value, "__index__"):
        value = value.__index__()
    return _parse_seed(None) if value in (-1, "-1", "random") else value


def _check_box(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    if not (left < right and top < bottom):
        raise RequestError(
            "{0} must be left, top, right, bottom as fractions of the image's sides, such as "
            f"0, 0, 0.5, 1, got {', '.join(f'{value:g}' for value in box)}.",
            "",
        )
    return box


BOX = re.compile(r"[0-9.]+( *, *[0-9.]+){3}")


def split_box(text: str) -> list[str] | None:
    """Return the four numbers of a box LEFT,TOP,RIGHT,BOTTOM, unchecked; None for other texts."""
    return text.split(",") if BOX.fullmatch(text) else None


FilePath = Annotated[
    str,
    PlainValidator(_check_path),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_PATH}),
]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
Name = Annotated[str, Field(max_length=64)]
Token = Annotated[str, Field(min_length=1, max_length=64)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Box = Annotated[tuple[Fraction, Fraction, Fraction, Fraction], AfterValidator(_check_box)]
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE, allow_inf_nan=False)]
LoraScale = Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE, allow_inf_nan=False)]
Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]
Seed = Annotated[int, BeforeValidator(_parse_seed), Field(ge=0, le=MAX_SEED)]


class RequestError(OptionError):
    """A request that cannot be run.

    The message names fields of the request. A front end whose users know the fields by other
    names, such as `--steps`, gets the message in its terms from `rename`.

    Args:
        template: one sentence, with `{0}`, `{1}`, ... where fields are named.
        fields: the fields, as dotted paths, such as `people.0.scale`.
    """

    def __init__(self, template: str, *fields: str) -> None:
        self.template = template
        self.fields = fields
        super().__init__(template.format(*map(_short_name, fields)))

    def rename(self, names: Mapping[str, str]) -> OptionError:
        """Return the same error with other names of fields.

        Args:
            names: path of a field, without positions in lists -> its name in the front end.
        """
        renamed = []
        for field in self.fields:
            path = re.sub(r"\.\d+", "", field)
            renamed.append(names.get(path, _short_name(field)))
        message = self.template.format(*renamed)
        # several fields can be one option
        return OptionError(re.sub(r"(--[\w-]+)((, | and | or )\1(?![\w-]))+", r"\1", message))


def _short_name(path: str) -> str:
    """Return how messages name a field: options of the identity and of the model by name alone."""
    name = path.removeprefix("identity.").removeprefix("model.")
    return name if len(name) <= LONGEST_QUOTE else name[:LONGEST_QUOTE] + "..."


def quote(value: object) -> str:
    """Quote a value of the user for the template of a `RequestError`."""
    text = repr(value)
    return literal(text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "...")


def literal(text: str) -> str:
    """Return a text without placeholders for the template of a `RequestError`."""
    return text.replace("{", "{{").replace("}", "}}")
