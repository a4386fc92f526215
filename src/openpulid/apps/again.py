"""An image made again: what it says of its making, and whether the files that it names are what they were."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from openpulid.errors import OptionError

FILES = ("id", "mask", "control_picture", "adapter", "base")
"""What a request names by its path. An image keeps it as it was typed, since images are shared and the folders of somebody's
machine are not for everybody; what tells another file of that name is the fingerprint."""


def fingerprints(request: Mapping[str, Any]) -> dict[str, str]:
    """Of the files that a request names."""
    from openpulid.weights import fingerprint

    named = {name: request[name] for name in FILES if request[name]}
    return {name: fingerprint(file) for name, file in named.items() if os.path.isfile(file)}


def said(image: str) -> dict[str, Any]:
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
        raise OptionError(f"{image} does not say how it was made; only images of `pulid generate` do.")
    return request


def check_files(image: str, request: Mapping[str, Any]) -> None:
    """That what an image was made with is here, and nothing else in its place. Older images carry no fingerprints.

    Raises:
        OptionError: a file is not here, or has changed.
    """
    now, before = fingerprints(request), request["fingerprints"] or {}
    for name in FILES:
        file = request[name]
        # a base may be a name of the hub, and a method's adapter a folder
        if file and name not in now and (name in before or (name != "base" and not os.path.exists(file))):
            raise OptionError(
                f"{image} was made with {file}, which is not here; names are kept as they were typed, by `pulid web` without a "
                "folder, so run this where it lies."
            )
        if name in now and before.get(name, now[name]) != now[name]:
            what = "may hold somebody else now" if name == "id" else "would make another image"
            raise OptionError(
                f"{file} has changed since {image} was made with it and {what}; put the former file back, or leave --from out."
            )
