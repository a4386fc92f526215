"""What an image file of any program states about its origin: request, XMP, content credentials."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from openpulid.errors import ImageError, OptionError
from openpulid.io.content_credentials import ContentCredentials, has_library, read_credentials
from openpulid.io.metadata import KEY, XMP_KEY, find_text
from openpulid.io.xmp import XmpFacts, parse_packet
from openpulid.pipelines.provenance import Provenance

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF")
"""Pillow's names of the formats that are inspected."""


@dataclass(frozen=True)
class FileReport:
    """What a file carries. A field that is None stands for what it does not carry.

    Attributes:
        path: the file.
        file_format: its format, such as "PNG".
        size: width and height in pixels.
        provenance: the request, see `Provenance`.
        xmp: how the image was made, and by which program.
        credentials: the C2PA manifest.
        is_checked: whether the file was searched for a manifest, which needs c2pa-python.
        problems: what is broken: "request", "xmp" or "content_credentials" -> the reason.
    """

    path: Path
    file_format: str
    size: tuple[int, int]
    provenance: Provenance | None
    xmp: XmpFacts | None
    credentials: ContentCredentials | None
    is_checked: bool
    problems: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {
            "file": str(self.path),
            "format": self.file_format,
            "width": self.size[0],
            "height": self.size[1],
            "provenance": self.provenance and self.provenance.to_metadata(),
            "xmp": self.xmp and asdict(self.xmp),
            "content_credentials": self.credentials and asdict(self.credentials),
            "content_credentials_checked": self.is_checked,
            "problems": self.problems,
        }


def inspect_file(path: str | os.PathLike[str], trust_anchors: bytes | None = None) -> FileReport:
    """Read what an image file carries. Its pixels are not decoded.

    Args:
        path: a PNG, JPEG, WebP, TIFF or GIF file, which may come from anybody.
        trust_anchors: see `read_credentials`.

    Raises:
        ImageError: the file cannot be read, or is not an image.
    """
    path = Path(path)
    problems = {}
    parameters = find_text(path, KEY)  # first: it refuses what is no regular file
    packet = find_text(path, XMP_KEY)
    with _open_header(path) as image:
        file_format = "JPEG" if image.format == "MPO" else str(image.format)
        size = image.size
        if packet is None:
            packet = image.info.get("xmp")
    provenance = None
    if parameters is not None:
        try:
            provenance = Provenance.from_json(parameters)
        except OptionError as error:
            problems["request"] = f"its request cannot be read: {error}"
    xmp = None
    if packet is not None:
        try:
            xmp = parse_packet(packet.encode() if isinstance(packet, str) else packet)
        except ValueError as error:
            problems["xmp"] = str(error)
    credentials = None
    is_checked = has_library()
    if is_checked:
        with path.open("rb") as file:
            credentials = read_credentials(file, Image.MIME[file_format], trust_anchors)
    if credentials is not None and credentials.is_broken:
        problems["content_credentials"] = f"its content credentials are {credentials.state}"
    return FileReport(path, file_format, size, provenance, xmp, credentials, is_checked, problems)


@contextmanager
def _open_header(path: Path) -> Iterator[Image.Image]:
    """Open an image without decoding its pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata, and many pixels
        try:
            image = Image.open(path, formats=FORMATS)
        except Exception as error:  # OSError, ValueError, SyntaxError, struct.error ...
            if isinstance(error, OSError) and error.errno is not None:
                raise ImageError(path, error.strerror or str(error)) from None
            raise ImageError(
                path, "is not a PNG, JPEG, WebP, TIFF or GIF image, or is damaged"
            ) from None
    with image:
        yield image
