"""Load untrusted images as RGB, and masks as gray; every failure is an `ImageError`.

An image means the same as in the program that wrote it: orientation, color profile, bit depth and
alpha are applied. See `decoding` for the steps and limits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from openpulid.errors import ImageError, OptionError, PulidError, first_line
from openpulid.io.color import scale_to_8_bit
from openpulid.io.containers import UnusableFile
from openpulid.io.decode_process import decode_in_child
from openpulid.io.decoding import (
    MAX_PIXELS,
    MIN_SIDE,
    DecodedImage,
    DecodeOptions,
    decode_file,
    decode_image,
)

MAX_BYTES = 64 * 2**20

CHANNELS = (1, 3, 4)
"""Numbers of channels of an array: gray, RGB, RGBA."""

logger = logging.getLogger(__name__)

Source = str | PathLike[str] | bytes | memoryview | BinaryIO | Image.Image | np.ndarray
"""An image: a path, the content of a file, an open binary file, a PIL image, an array (H, W),
(H, W, 3) or (H, W, 4), or a tensor (3, H, W). Arrays and tensors are RGB: uint8, or float in
[0, 1]."""


@dataclass(frozen=True)
class _OpenOptions:
    """How to open an image, see `open_image`."""

    decode: DecodeOptions
    max_bytes: int
    time_limit: float | None


def open_image(
    source: Source,
    *,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    time_limit: float | None = None,
) -> Image.Image:
    """Open an image as upright 8-bit sRGB, with transparent pixels white.

    Args:
        source: see `Source`.
        name: the name used in error messages; the path by default.
        max_bytes: maximum file size in bytes.
        max_pixels: maximum width times height. Both limits are checked before decoding.
        min_side: minimum of width and height in pixels.
        time_limit: decode files in a child process with so many seconds of processor time. For
            servers, whose images are from strangers.

    Raises:
        ImageError: the image cannot be used; the message names the file and the reason.
        OptionError: the source is of another type.
    """
    decode = DecodeOptions(is_mask=False, max_pixels=max_pixels, min_side=min_side)
    return _open(source, name, _OpenOptions(decode, max_bytes, time_limit))


def open_mask(
    source: Source,
    *,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    time_limit: float | None = None,
) -> Image.Image:
    """Open a mask as upright 8-bit gray, with transparent pixels black.

    Args:
        source: see `Source`.
        name: as for `open_image`, like the following.
        max_bytes: see there.
        max_pixels: see there.
        time_limit: see there.

    Raises:
        ImageError: the image cannot be used; the message names the file and the reason.
        OptionError: the source is of another type.
    """
    decode = DecodeOptions(is_mask=True, max_pixels=max_pixels, min_side=1)
    return _open(source, name, _OpenOptions(decode, max_bytes, time_limit))


def is_image_source(value: Any) -> bool:
    """Return whether a value is one image, as `open_image` accepts it, and not several."""
    return (
        isinstance(value, (str, PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray))
        or hasattr(value, "read")
        or _is_tensor(value)
    )


def limit_size(image: Image.Image, longest: int) -> Image.Image:
    """Shrink an image to a longer side of at most `longest` pixels.

    Pixels are averaged, not sampled. A smaller image is returned unchanged.
    """
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _open(source: Any, name: str | None, options: _OpenOptions) -> Image.Image:
    label = name or image_label(source)
    try:
        decoded = _decode(source, label, options)
    except UnusableFile as error:
        raise ImageError(label, str(error)) from None
    for note in decoded.notes:
        logger.warning("%s: %s", label, note)
    return decoded.image


def _decode(source: Any, label: str, options: _OpenOptions) -> DecodedImage:
    if isinstance(source, Image.Image):
        return decode_image(source, options.decode)
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return decode_image(_from_array(source), options.decode)
    data = _read(source, label, options.max_bytes)
    if options.time_limit is not None:
        return decode_in_child(data, options.decode, options.time_limit)
    return decode_file(data, options.decode)


def image_label(source: Any) -> str:
    """Return how messages call an image: its path, if it has one."""
    if isinstance(source, (str, PathLike)):
        return str(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or "image")


def _is_tensor(value: Any) -> bool:
    # this module does not import torch, which takes a second
    return hasattr(value, "detach") and hasattr(value, "cpu")


def _from_array(source: Any) -> Image.Image:
    """Convert an array or tensor to a PIL image.

    Raises:
        UnusableFile: shape, type or values are not those of an image.
    """
    is_tensor = not isinstance(source, np.ndarray)
    if is_tensor:
        source = source.detach().cpu()
        values = (source.float() if source.is_floating_point() else source).numpy()
    else:
        values = source
    shape = values.shape
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim == 3:
        is_first = values.shape[0] in CHANNELS
        is_last = values.shape[2] in CHANNELS
        if is_first and (is_tensor or not is_last):
            values = np.moveaxis(values, 0, 2)
        if values.shape[2] == 1:
            values = values[..., 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in CHANNELS)):
        raise UnusableFile(
            f"has the shape {shape}; an image has the shape (H, W, 3) as an array or (3, H, W) as "
            "a tensor, and several images are a list"
        )
    is_float = np.issubdtype(values.dtype, np.floating)
    if not is_float and values.dtype not in (np.uint8, np.uint16, bool):
        raise UnusableFile(f"has the type {values.dtype}; use uint8, or float from 0 to 1")
    if not values.size:
        raise UnusableFile("is empty")
    if is_float and not ((values >= 0) & (values <= 1)).all():
        raise UnusableFile(
            f"has values from {values.min():g} to {values.max():g}; "
            "float values must be from 0 to 1"
        )
    return Image.fromarray(np.ascontiguousarray(scale_to_8_bit(values)))


def _read(source: Any, label: str, max_bytes: int) -> bytes:
    """Read a file completely, but at most one byte more than the limit."""
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source[: max_bytes + 1])
        elif isinstance(source, (str, PathLike)):
            path = Path(source)
            if path.is_dir():
                raise ImageError(label, "is a folder, not an image")
            if path.exists() and not path.is_file():
                raise ImageError(label, "is not a regular file")
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        elif hasattr(source, "read"):
            data = source.read(max_bytes + 1)
        else:
            raise OptionError(
                f"expected an image, got {type(source).__name__}; pass a path, a PIL image, an "
                "array, a tensor, bytes or an open file."
            )
    except FileNotFoundError:
        raise ImageError(label, "does not exist") from None
    except (OSError, ValueError) as error:
        if isinstance(error, PulidError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ImageError(label, f"cannot be read ({reason})") from None
    if isinstance(data, str):
        raise UnusableFile('is a text file; open it with mode "rb"')
    if not data:
        raise ImageError(label, "is empty")
    if len(data) > max_bytes:
        raise ImageError(label, f"is larger than {max_bytes / 2**20:.0f} MB")
    return data
