"""What an image file says about its generation: the resolved request, the version, input hashes.

An image may come from anybody. It can name a preset, published weights and options. It names no
other file: whoever generates the image again passes every file again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from openpulid import __version__
from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import fingerprint
from openpulid.io.hub import WEIGHTS, is_repo_id
from openpulid.io.metadata import read_metadata
from openpulid.pipelines.presets import PRESETS
from openpulid.pipelines.request import OPEN_FACES, GenerationRequest
from openpulid.pipelines.request_fields import Name, RequestError, literal
from openpulid.pipelines.request_part import RequestPart

HASH_DIGITS = 4
"""Hexadecimal digits of an input's hash. One in 65,536 files has the same, so the hash reveals a
changed input, and is too short to identify a photo."""

WEIGHT_FIELDS = ("base", "model")
"""Last parts of the fields that can hold a published name. Any other field names a file, which is
passed again."""

SEPARATOR = re.compile(r"/|\\(?!x[0-9a-f]{2})")
"""Between the parts of a path, also of Windows; `\\xe9` stands for a byte that is not UTF-8."""


class Provenance(RequestPart):
    """How an image was generated.

    Attributes:
        request: the resolved request of this image alone. Its files are names without folders; a
            request that can run comes from `restore`.
        version: version of openpulid.
        input_hashes: path of a field in the request -> hash of the file that it names.
    """

    request: GenerationRequest
    version: Name = __version__
    input_hashes: dict[str, Name] = Field(default_factory=dict, max_length=256)

    @field_validator("request")
    @classmethod
    def _check_request(cls, request: GenerationRequest) -> GenerationRequest:
        if request.num_images != 1:
            raise RequestError("{0} must be 1 in the request of an image.", "num_images")
        names = {field: _file_name(field, path) for field, path in request.input_files()}
        return request.with_files(names)

    @classmethod
    def create(cls, request: GenerationRequest, fingerprints: Mapping[str, str]) -> Provenance:
        """Create it for an image.

        Args:
            request: the resolved request of the image.
            fingerprints: of the input files, see `fingerprint_inputs`.
        """
        hashes = {field: _shorten(value, request) for field, value in fingerprints.items()}
        return cls(request=request, input_hashes=hashes)

    @classmethod
    def read(cls, image: str | os.PathLike[str]) -> Provenance:
        """Read it from an image file.

        Raises:
            ImageError: the file cannot be read.
            OptionError: it carries no parameters, or they are invalid.
        """
        metadata = read_metadata(image)
        try:
            return cls.from_json(metadata)
        except OptionError as error:
            raise OptionError(
                f"{os.fspath(image)} contains no valid generation parameters: {error}"
            ) from None

    @classmethod
    def from_json(cls, metadata: str) -> Provenance:
        """Read it from the parameters of an image file.

        Raises:
            RequestError: they are invalid.
        """
        return cls.model_validate_json(metadata, strict=True)

    def restore(
        self,
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        image: str | os.PathLike[str] = "the image",
    ) -> GenerationRequest:
        """Return the request that generates the image again.

        Args:
            files: path of a field -> the file, for every field of `required_files`.
            image: the image file, for messages.

        Raises:
            RequestError: a file is missing, is not used by the request, or is another one than the
                image was generated with; or the image names no model.
            PulidError: an identity file cannot be read.
        """
        files = files or {}
        label = literal(os.fspath(image))
        if self.request.model is None:
            raise RequestError(
                f"{label} contains no valid generation parameters: {{0}} is missing.", "model"
            )
        required = self.required_files()
        if missing := [field for field in required if field not in files]:
            names = " and ".join(literal(required[field]) for field in missing)
            raise RequestError(
                f"{label} was generated with {names}; pass {_join(len(missing), 'and')}.", *missing
            )
        if unused := [field for field in files if field not in required]:
            raise RequestError(
                f"{label} needs no {_join(len(unused), 'or')}; leave it out.", *unused
            )
        request = self.request.with_files(files)
        for field, value in fingerprint_inputs(request).items():
            expected = self.input_hashes.get(field)
            if expected is not None and expected != _shorten(value, request):
                raise RequestError(
                    f"{literal(os.fspath(files[field]))} is not the file that {label} was "
                    "generated with, or has changed since; pass the original with {0}, or "
                    "generate a new image.",
                    field,
                )
        return request

    def required_files(self) -> dict[str, str]:
        """Return path of a field -> name, for every file that `restore` needs."""
        return {
            field: name
            for field, name in self.request.input_files()
            if not _is_published(field, name)
        }

    def to_metadata(self) -> dict[str, Any]:
        """Return the JSON to store in an image file."""
        return self.model_dump(mode="json", exclude_none=True)


def fingerprint_inputs(request: GenerationRequest) -> dict[str, str]:
    """Hash the input files of a request; folders, published weights and missing files have no hash.

    Returns:
        Path of a field -> hash. That of an identity depends on its features alone.

    Raises:
        IdentityError: a file is not an identity.
        OptionError: a file cannot be read.
    """
    hashes = {}
    for field, path in request.input_files():
        if field.endswith(".identity"):
            hashes[field] = Identity.load(path).fingerprint
        elif not _is_published(field, path) and os.path.isfile(path):
            try:
                hashes[field] = fingerprint(path)
            except OSError as error:
                raise OptionError(f"{path} cannot be read ({error.strerror}).") from None
    return hashes


def _names_weights(field: str) -> bool:
    """Whether a field can hold the name of published weights, or OWNER/NAME of the hub."""
    return field.rpartition(".")[2] in WEIGHT_FIELDS


def _is_published(field: str, name: str) -> bool:
    """Whether a field holds the name of a preset or of published weights, not a path."""
    if field == "model.preset":
        return name in PRESETS
    if field == "model.face_pack":
        return name == OPEN_FACES
    return _names_weights(field) and name in WEIGHTS


def _file_name(field: str, path: str) -> str:
    """Return what an image stores of a path: its last part, in UTF-8, and no published name."""
    if _is_published(field, path):
        return path
    if _names_weights(field) and is_repo_id(path) and not os.path.exists(path):
        return path  # OWNER/NAME in the hub's cache
    name = SEPARATOR.split(path.rstrip("/\\"))[-1]
    if name in ("", ".", ".."):
        name = "folder"
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return f"./{name}" if _is_published(field, name) else name


def _shorten(value: str, request: GenerationRequest) -> str:
    """Return the hash of a file that an image stores.

    The seed and the prompt are part of it: images of one person cannot be linked by the hash.
    """
    text = f"{request.seed} {request.prompt} {value}"
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def _join(count: int, word: str) -> str:
    """Return `count` placeholders of a `RequestError`, as an enumeration."""
    names = [f"{{{index}}}" for index in range(count)]
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
