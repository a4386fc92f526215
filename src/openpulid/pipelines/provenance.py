"""What an image file says about its generation: the resolved request, the version, input hashes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from openpulid import __version__
from openpulid.errors import OptionError
from openpulid.io.metadata import hash_files, read_metadata
from openpulid.pipelines.request import GenerationRequest, RequestPart


class Provenance(RequestPart):
    """How an image was generated.

    Attributes:
        request: the resolved request of this image alone.
        version: version of openpulid.
        input_hashes: path of a field in the request -> hash of the file that it names.
    """

    request: GenerationRequest
    version: str = __version__
    input_hashes: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def read(cls, image: str | os.PathLike[str]) -> Provenance:
        """Read it from an image file.

        Raises:
            ImageError: the file is not an image.
            OptionError: it carries no parameters, or they are invalid.
        """
        metadata = read_metadata(image)
        try:
            return cls.model_validate(metadata)
        except OptionError as error:
            raise OptionError(
                f"{os.fspath(image)} contains no valid generation parameters: {error}"
            ) from None

    def verify_inputs(self, image: str | os.PathLike[str]) -> None:
        """Check that the input files exist and have not changed.

        Args:
            image: the image file, for messages.

        Raises:
            OptionError: an input file is missing or has changed.
        """
        files = dict(self.request.input_files())
        hashes = hash_files(files.items())
        for field, path in files.items():
            expected = self.input_hashes.get(field)
            if field not in hashes and (expected or not _may_be_elsewhere(field, path)):
                raise OptionError(
                    f"{os.fspath(image)} was generated with {path}, which does not exist; "
                    "--from must run in the directory of the input files."
                )
            if expected and hashes[field] != expected:
                raise OptionError(
                    f"{path} has changed since {os.fspath(image)} was generated; "
                    "restore the original file, or generate without --from."
                )

    def to_metadata(self, hide_directories: bool = False) -> dict[str, Any]:
        """Return the JSON to store in an image file.

        Args:
            hide_directories: store input files by name alone, without their directories.
        """
        metadata = self.model_dump(mode="json", exclude_none=True)
        if hide_directories:
            request = metadata["request"]
            for part in (*request["people"], *request["controls"]):
                _hide_directories(part)
        return metadata


def _may_be_elsewhere(field: str, path: str) -> bool:
    """Whether a path without a hash is a directory, or OWNER/NAME in the hub's cache."""
    return field == "model.base" or os.path.exists(path)


def _hide_directories(part: dict[str, Any]) -> None:
    for name in ("identity", "mask", "image"):
        if name in part:
            part[name] = Path(part[name]).name
    if "images" in part:
        part["images"] = [Path(image).name for image in part["images"]]
