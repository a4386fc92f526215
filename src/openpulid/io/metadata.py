"""An image made again: what it says of its making, and whether the files that it names are what they were."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpulid.errors import OptionError

if TYPE_CHECKING:
    from PIL import Image


import os

FILES = ("id", "mask", "control_picture", "adapter", "base")
"""What a request names by its path. An image keeps it as it was typed, since images are shared and the folders of somebody's
machine are not for everybody; what tells another file of that name is the fingerprint."""


def fingerprints(request: Mapping[str, Any]) -> dict[str, str]:
    """Of the files that a request names."""
    from openpulid.io.checkpoints import fingerprint

    named = {name: request[name] for name in FILES if request[name]}
    return {name: fingerprint(file) for name, file in named.items() if os.path.isfile(file)}


def read_request(image: str) -> dict[str, Any]:
    """The request that an image carries.

    Raises:
        OptionError: it carries none.
    """
    from PIL import Image

    with Image.open(image) as opened:
        text = opened.info.get("openpulid")
    try:
        request = json.loads(text or "")
    except ValueError:
        request = None
    if not isinstance(request, dict) or not {"prompt", "preset", "seed"} <= request.keys():
        raise OptionError(
            f"{image} does not say how it was made; only images of `pulid generate` do."
        )
    return request


def verify_inputs(image: str, request: Mapping[str, Any]) -> None:
    """That what an image was made with is here, and nothing else in its place. Older images carry no fingerprints.

    Raises:
        OptionError: a file is not here, or has changed.
    """
    now, before = fingerprints(request), request["fingerprints"] or {}
    for name in FILES:
        file = request[name]
        # a base may be a name of the hub, and a method's adapter a folder
        if (
            file
            and name not in now
            and (name in before or (name != "base" and not os.path.exists(file)))
        ):
            raise OptionError(
                f"{image} was made with {file}, which is not here; names are kept as they were typed, by `pulid web` without a "
                "folder, so run this where it lies."
            )
        if name in now and before.get(name, now[name]) != now[name]:
            what = "may hold somebody else now" if name == "id" else "would make another image"
            raise OptionError(
                f"{file} has changed since {image} was made with it and {what}; put the former file back, or leave --from out."
            )


def image_name(prompt: str, seed: int) -> str:
    """What an image's file is called: the prompt's first words and the seed."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:48].strip("-") or "image"
    return f"{words}-{seed}.png"


def save_image(image: Image.Image, path: Path, request: Mapping[str, Any] | None = None) -> None:
    """Writes a picture; a PNG carries the request that made it under "openpulid", as JSON."""
    from PIL.PngImagePlugin import PngInfo

    extra: dict[str, Any] = {"quality": 90}  # of what is not kept exactly
    if request is not None:
        extra["pnginfo"] = PngInfo()
        extra["pnginfo"].add_itxt("openpulid", json.dumps(request, ensure_ascii=False))
    try:
        image.save(path, **extra)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror or error}).") from None
