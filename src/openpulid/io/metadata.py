"""Image files, and what they carry: their origin as XMP, and generation parameters."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from openpulid.errors import ImageError, OptionError
from openpulid.io.containers import PNG_SIGNATURE
from openpulid.io.files import write_bytes
from openpulid.io.xmp import DigitalSourceType, create_packet

if TYPE_CHECKING:
    from PIL import Image

KEY = "openpulid"
"""Name of the PNG text chunk with the parameters, as JSON."""

XMP_KEY = "XML:com.adobe.xmp"
"""Name of the PNG text chunk with the XMP packet."""

JPEG_QUALITY = 90
MAX_TEXT = 1 << 20
"""Bytes of a text chunk that are read, before and after decompression."""

TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
MAX_CHUNKS = 100_000


def read_metadata(image: str | os.PathLike[str]) -> str:
    """Read the parameters that a PNG file carries.

    Returns:
        The JSON, unchecked.

    Raises:
        ImageError: the file cannot be read.
        OptionError: it carries no parameters.
    """
    text = find_text(image, KEY)
    if text is None:
        raise OptionError(
            f"{Path(image)} contains no generation parameters; "
            "only PNG images of `pulid generate` and `pulid web` do."
        )
    return text


def find_text(image: str | os.PathLike[str], key: str) -> str | None:
    """Read a text chunk of a PNG file, before or after its pixels.

    The pixels are not decoded, and no other text is read: both may be damaged, or large.

    Args:
        image: the file.
        key: keyword of the chunk.

    Returns:
        The text; None if there is none, also in a file that is no PNG.

    Raises:
        ImageError: the file cannot be read.
    """
    path = Path(image)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise ImageError(path, "is not a regular file")
        with path.open("rb") as file:
            return _find_text(file, key) if file.read(8) == PNG_SIGNATURE else None
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from None
    except ValueError as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(path, "is not a file name") from None


def _find_text(file: BinaryIO, key: str) -> str | None:
    """Return the text of a chunk of a PNG file, which is open behind its signature."""
    for _ in range(MAX_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            return None
        length, kind = struct.unpack(">I4s", header)
        if kind == b"IEND":
            return None
        if kind not in TEXT_CHUNKS or length > MAX_TEXT:
            file.seek(length + 4, os.SEEK_CUR)  # 4 bytes of checksum
            continue
        name, _, content = file.read(length).partition(b"\0")
        file.seek(4, os.SEEK_CUR)
        if name == key.encode():
            return _decode_text(kind, content)
    return None


def _decode_text(kind: bytes, content: bytes) -> str | None:
    """Decode a text chunk behind its keyword (PNG specification, 11.3.3); None if it is damaged.

    Parameters are written as iTXt. Programs that save the image again use any of the kinds; tEXt
    and zTXt are Latin-1, but some programs write UTF-8.
    """
    is_compressed = kind == b"zTXt"
    if kind == b"iTXt":
        is_compressed = content[:1] == b"\1"
        language_and_text = content[2:].split(b"\0", 2)
        content = b"\0" + language_and_text[-1]
    if kind != b"tEXt":
        content = content[1:]  # the method of compression; there is only one
    if is_compressed:
        inflate = zlib.decompressobj()
        try:
            content = inflate.decompress(content, MAX_TEXT)
        except zlib.error:
            return None
    with suppress(UnicodeDecodeError):
        return content.decode("utf-8")
    return content.decode("utf-8" if kind == b"iTXt" else "latin-1", "replace")


def encode_image(
    image: Image.Image,
    suffix: str = ".png",
    metadata: Mapping[str, Any] | None = None,
    source_type: DigitalSourceType | None = DigitalSourceType.GENERATED,
    quality: int | None = None,
) -> bytes:
    """Return the content of an image file, with an XMP packet that states its origin.

    Args:
        image: the image.
        suffix: determines the format.
        metadata: parameters to store in a PNG file.
        source_type: how the image was made. None, for photographs and plots, states nothing.
        quality: of JPEG and WebP, from 0 to 100; `JPEG_QUALITY` by default.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    options: dict[str, Any] = {
        "quality": JPEG_QUALITY if quality is None else quality,
        "pnginfo": PngInfo(),
        "xmp": b"",
    }
    if source_type is not None:
        packet = create_packet(source_type)
        options["xmp"] = packet.encode()  # JPEG and WebP
        options["pnginfo"].add_itxt(XMP_KEY, packet)
    if metadata is not None:
        options["pnginfo"].add_itxt(KEY, json.dumps(metadata, ensure_ascii=False))
    content = BytesIO()
    image.save(content, Image.registered_extensions()[suffix.lower()], **options)
    return content.getvalue()


def save_image(
    image: Image.Image,
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    source_type: DigitalSourceType | None = DigitalSourceType.GENERATED,
) -> None:
    """Write an image file in one step, replacing an existing one.

    Args:
        image: the image.
        path: the file; its suffix determines the format.
        metadata: parameters to store in a PNG file.
        source_type: how the image was made, see `encode_image`.

    Raises:
        OutputError: the file cannot be written; an existing one is as it was.
    """
    write_bytes(path, encode_image(image, path.suffix, metadata, source_type))
