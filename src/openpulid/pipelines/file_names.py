"""Names of image files, from a pattern such as "{prompt}-{seed}"."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from string import Formatter

from openpulid.errors import OptionError, suggest
from openpulid.pipelines.request import GenerationRequest

DEFAULT_PATTERN = "{prompt}-{seed}"
SUFFIX = ".png"
MAX_PROMPT_LENGTH = 48
MAX_NAME_BYTES = 200
"""Most file systems allow 255 bytes, of which a number and the suffix take some."""

FORBIDDEN = re.compile(r'[\x00-\x1f<>:"/\\|?*]')
"""Characters that a file name cannot have on some system."""


def image_name(request: GenerationRequest, pattern: str = DEFAULT_PATTERN) -> str:
    """Return the name of an image file.

    Args:
        request: the resolved request of one image.
        pattern: text with fields in braces, see `list_fields`. A field can have a format, such as
            `{seed:05}`.

    Raises:
        OptionError: the pattern has another field, is no file name, or has a format that the field
            does not have.
    """
    fields = list_fields(request)
    check_pattern(pattern)
    try:
        name = Formatter().vformat(pattern, (), fields)
    except (ValueError, TypeError) as error:
        raise OptionError(f"the name {pattern!r} cannot be formatted: {error}.") from None
    name = FORBIDDEN.sub("-", name).strip(" .-")
    while len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        name = name[:-1]
    return (name or f"image-{request.seed}") + SUFFIX


def list_fields(request: GenerationRequest) -> dict[str, object]:
    """Return the fields that a pattern can have."""
    model = request.model
    return {
        "prompt": _first_words(request.prompt),
        "seed": request.seed,
        "scale": _describe_scales(request.identity_scales),
        "steps": request.num_inference_steps,
        "guidance": request.guidance_scale,
        "width": request.width,
        "height": request.height,
        "preset": "mini" if model is None else model.preset,
        "method": (None if model is None else model.method) or "pulid",
    }


def _describe_scales(scales: Sequence[float]) -> str | float:
    """Return a number, which can have a format; or a text for several people."""
    if len(scales) > 1:
        return "-".join(f"{scale:g}" for scale in scales)
    scale = float(f"{scales[0]:g}") if scales else 0.0
    return int(scale) if scale.is_integer() else scale


def check_pattern(pattern: str) -> None:
    """Check the fields of a pattern.

    Raises:
        OptionError: it has an unknown field, or is no file name.
    """
    known = list_fields(GenerationRequest(prompt="portrait"))
    try:
        parsed = [part for part in Formatter().parse(pattern) if part[1] is not None]
    except ValueError as error:
        raise OptionError(f"the name {pattern!r} is no pattern: {error}.") from None
    fields = [field or "" for _, field, _, _ in parsed]
    if any("{" in (spec or "") for _, _, spec, _ in parsed):
        raise OptionError(f"the name {pattern!r} has a field inside a field; write a number there.")
    for field in fields:
        if field not in known:
            raise OptionError(
                f"the name {pattern!r} has an unknown field {field!r}{suggest(field, known)}; "
                f"available: {', '.join(known)}."
            )
    if re.search(r"[/\\]", pattern):
        raise OptionError(f"the name {pattern!r} contains a folder; choose the folder with -o.")


def _first_words(prompt: str) -> str:
    """Return the first words of a prompt, in letters that the file system can store."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).lower())
    name = "-".join(words)[:MAX_PROMPT_LENGTH].strip("-")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # the system's encoding lacks a letter
        name = name.encode("ascii", "ignore").decode().strip("-")
    return name or "image"
