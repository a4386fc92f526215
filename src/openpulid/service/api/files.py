"""The files of a request: data URLs, parts of a form, and stored identities; never a path.

Nothing that a request names is opened: no path, no URL, no repository. Each file field is replaced
by its own path, such as `people.0.images.0`, under which its content is kept.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import RequestError, quote
from openpulid.service.config import Limits

IDENTITY_ID = re.compile(r"identity-[A-Za-z0-9_-]{16,64}")

DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
LONGEST_HEADER = 200
"""Characters of a data URL before its content."""

UPLOADED_FIELDS = (
    "people.images",
    "people.mask",
    "people.identity",
    "init_image.image",
    "init_image.mask",
    "controls.image",
    "style_image.image",
    "loras.model",
    "embeddings.file",
)
"""Fields that name an uploaded file."""

NAME_FIELDS = ("controls.model", "style_image.model")
"""Fields that name installed weights, see `Offer.check_names`. The others are the server's."""

DEEPEST = 4
"""Parts of the longest path of a file field."""

Content = bytes | Path
"""The content of an uploaded file, or a file of the data folder."""


@dataclass
class FileTaker:
    """Takes the files out of the fields of a request.

    Args:
        parts: name of a part of a form -> its content.
        find_identity: returns the file of a stored identity, or None.
        limits: of files.

    Attributes:
        files: path of a field -> its file.
    """

    parts: Mapping[str, bytes]
    find_identity: Callable[[str], Path | None]
    limits: Limits
    files: dict[str, Content] = field(default_factory=dict)

    def take(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a request with paths of fields in place of their files.

        Raises:
            RequestError: a file field is no data URL, part or identity; there are too many files,
                or a part of the form is not used.
        """
        used: set[str] = set()
        replaced = {name: self._replace(value, name, used) for name, value in data.items()}
        if unused := sorted(self.parts.keys() - used):
            raise RequestError(
                "the uploaded file {0} is not used; name it in a field, such as "
                'people=[{{"images": ["{0}"]}}].',
                unused[0],
            )
        return replaced

    def check_taken(self, request: GenerationRequest) -> None:
        """Check that no field of a request names a file that has not been taken.

        Raises:
            RequestError: a field does.
        """
        for path, value in request.input_files():
            field = _without_positions(path)
            is_name = field in NAME_FIELDS or field.startswith("model.")
            if not is_name and not (value == path and path in self.files):
                raise RequestError(f"{{0}} is not an uploaded file: {quote(value)}.", path)

    def _replace(self, value: Any, path: str, used: set[str]) -> Any:
        if path.count(".") >= DEEPEST:
            return value
        if isinstance(value, dict):
            if _without_positions(path) == "embeddings":
                value = self._name_embedding(value, path)
            return {
                name: self._replace(entry, f"{path}.{name}", used) for name, entry in value.items()
            }
        if isinstance(value, list):
            return [
                self._replace(entry, f"{path}.{number}", used) for number, entry in enumerate(value)
            ]
        if _without_positions(path) not in UPLOADED_FIELDS or not isinstance(value, str):
            return value
        if value in self.parts:
            used.add(value)
        self.files[path] = self._read(path, value)
        if len(self.files) > self.limits.files:
            raise RequestError(f"a request must have at most {self.limits.files} files.", path)
        return path

    def _name_embedding(self, value: dict[str, Any], path: str) -> dict[str, Any]:
        """Give a textual inversion the name of its uploaded file, unless it has a word."""
        if value.get("token") is not None or not isinstance(value.get("file"), str):
            return value
        if value["file"] not in self.parts:  # a data: URL has no name
            raise RequestError("{0} is missing: the word for an embedding.", f"{path}.token")
        return {**value, "token": Path(value["file"]).stem}

    def _read(self, path: str, value: str) -> Content:
        if value in self.parts:
            content = self.parts[value]
        elif value.startswith("data:"):
            content = self._decode(path, value)
        elif path.endswith(".identity") and IDENTITY_ID.fullmatch(value):
            file = self.find_identity(value)
            if file is None:
                raise RequestError(f"{{0}}: there is no identity {value}.", path)
            return file
        else:
            kinds = "a data: URL in base64, or the name of a file in a form"
            if path.endswith(".identity"):
                kinds = "the id of an identity, " + kinds
            raise RequestError(
                f"{{0}} must be {kinds}; paths and other URLs are not opened, got {quote(value)}.",
                path,
            )
        if not content:
            raise RequestError("{0} is empty.", path)
        if len(content) > self.limits.file_bytes:
            raise RequestError(f"{{0}} is larger than {self.limits.file_bytes / 2**20:g} MB.", path)
        return content

    def _decode(self, path: str, url: str) -> bytes:
        header = DATA_URL.match(url[:LONGEST_HEADER])
        try:
            if header is None:
                raise ValueError
            return base64.b64decode(url[header.end() :], validate=True)
        except (ValueError, binascii.Error):
            raise RequestError(
                "{0} is not a data: URL in base64, such as data:image/png;base64,iVBORw0.", path
            ) from None


def _without_positions(path: str) -> str:
    return re.sub(r"\.\d+", "", path)
