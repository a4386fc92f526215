"""Text fields that name files and weights: a line NAME, or NAME:VALUE, for each."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from openpulid.io.hub import is_repo_id
from openpulid.pipelines.request_fields import RequestError, quote

NAME_AND_NUMBER = re.compile(r"(.+?)(?:\s*:\s*([-+]?[0-9.]+))?")
"""A line about weights that are not uploaded: a name, and perhaps a number."""


@dataclass(frozen=True)
class FileLine:
    """A line of a text field.

    Attributes:
        name: path of the upload, or what is named instead of one.
        value: what stands behind the colon; "" without one.
        is_upload: whether the name is that of an upload.
    """

    name: str
    value: str
    is_upload: bool


def read_lines(text: str | None, uploads: Sequence[str] | None) -> list[FileLine]:
    """Read the lines of a text field. An upload without a line has one without a value.

    Args:
        text: of the field. Lines name uploads without folders.
        uploads: paths of the uploaded files. Two of the same name need two lines.
    """
    waiting = list(uploads or ())
    lines = []
    for line in _split(text):
        upload = _find_upload(line, waiting)
        if upload is not None:
            waiting.remove(upload)
            value = line[len(Path(upload).name) :].lstrip().removeprefix(":").strip()
            lines.append(FileLine(upload, value, True))
        elif match := NAME_AND_NUMBER.fullmatch(line):
            lines.append(FileLine(match[1], match[2] or "", False))
    return lines + [FileLine(upload, "", True) for upload in waiting]


def add_lines(text: str | None, uploads: Sequence[str] | None, value: str = "") -> str:
    """Return the text of a field with a line for each upload that had none.

    Args:
        text: of the field.
        uploads: paths of the uploaded files.
        value: of new lines; `{}` stands for the name of the file without its suffix.
    """
    lines = list(_split(text))
    waiting = list(uploads or ())
    for line in lines:
        if (upload := _find_upload(line, waiting)) is not None:
            waiting.remove(upload)
    lines += [f"{Path(upload).name}:{value.format(Path(upload).stem)}" for upload in waiting]
    return "\n".join(lines)


def _split(text: str | None) -> Iterator[str]:
    return filter(None, map(str.strip, (text or "").splitlines()))


def _find_upload(line: str, uploads: Sequence[str]) -> str | None:
    """Return the upload that a line names: of several, the one with the longest name."""
    named = [
        upload
        for upload in uploads
        if re.match(re.escape(Path(upload).name) + r"\s*(:|$)", line) is not None
    ]
    return max(named, key=lambda upload: len(Path(upload).name), default=None)


def is_hub_name(name: str) -> bool:
    """Whether a text is OWNER/NAME on the hub, and no file or folder."""
    return is_repo_id(name) and not os.path.exists(name)


def check_name(
    name: str, field: str, offered: Collection[str], kind: str, allow_paths: bool
) -> str:
    """Check a name of weights that a visitor has typed.

    A relative path is none: an image of a stranger could name it, and its settings are restored.

    Args:
        name: typed by the visitor.
        field: of the request, for messages.
        offered: the names that are offered.
        kind: how messages call what is offered, such as "one of the list".
        allow_paths: whether the visitor may name files of the server.

    Raises:
        RequestError: it is neither offered, nor OWNER/NAME on the hub, nor a path that is allowed.
    """
    if name in offered:
        return name
    if os.path.isabs(name):
        if allow_paths:
            return name
        raise RequestError(
            "{0}: this page opens no files of its server, because other machines can open the "
            f"page; use {kind}, or OWNER/NAME on the hub.",
            field,
        )
    if is_hub_name(name):
        return name
    choices = [kind, "OWNER/NAME on the hub", *(["an absolute path"] if allow_paths else [])]
    raise RequestError(f"{{0}}: {quote(name)} is neither {' nor '.join(choices)}.", field)
