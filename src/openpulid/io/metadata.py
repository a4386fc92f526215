"""Generation parameters in image files, and hashes of the files they name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpulid.errors import ImageError, OptionError

if TYPE_CHECKING:
    from PIL import Image

KEY = "openpulid"
"""Name of the PNG text chunk with the parameters, as JSON."""

JPEG_QUALITY = 90


def hash_files(files: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Hash the files among (field, path) pairs; directories and missing files are left out.

    Returns:
        field -> hash.
    """
    from openpulid.io.checkpoints import fingerprint

    return {field: fingerprint(path) for field, path in files if os.path.isfile(path)}


def read_metadata(image: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the parameters that an image file carries.

    Raises:
        ImageError: the file is not an image.
        OptionError: it carries no parameters.
    """
    from PIL import Image

    try:
        with Image.open(image) as opened:
            text = opened.info.get(KEY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not an image"
        raise ImageError(image, reason) from None
    try:
        metadata = json.loads(text or "")
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise OptionError(
            f"{os.fspath(image)} contains no generation parameters; "
            "only PNG images of `pulid generate` and `pulid web` do."
        )
    return metadata


def image_name(prompt: str, seed: int) -> str:
    """Return a file name: the first words of the prompt, and the seed."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:48].strip("-") or "image"
    return f"{words}-{seed}.png"


def save_image(image: Image.Image, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an image file.

    Args:
        image: the image.
        path: the file; its suffix determines the format.
        metadata: parameters to store in a PNG file.

    Raises:
        OptionError: the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    options: dict[str, Any] = {"quality": JPEG_QUALITY}
    if metadata is not None:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(KEY, json.dumps(metadata, ensure_ascii=False))
    try:
        image.save(path, **options)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror or error}).") from None
