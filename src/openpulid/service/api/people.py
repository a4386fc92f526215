"""Requests about one person, whose fields are not in `people`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from openpulid.pipelines.request_fields import RequestError
from openpulid.service.api.bodies import Body
from openpulid.service.api.decoding import convert_mask
from openpulid.service.api.fields import Fields, translate
from openpulid.service.api.files import Content
from openpulid.service.config import Limits

IMAGE = "image"
"""The field, or the parts of a form, with the reference images."""
MASK = "mask"
"""The field, or the part of a form, with OpenAI's mask."""
MASK_PATH = f"people.0.{MASK}"
"""Where `gather_person` puts it."""
SAME_NAME = re.compile(r"-\d+$")
"""Suffix of the second file and more of a form with one name."""

EDIT_FIELDS = (IMAGE, MASK, "face_index", "face_order")
"""Fields of an edit that belong to its person."""

IDENTITY_FIELDS = (IMAGE, "identity", "face_index", "face_order")
"""The same of a request for an identity."""


def gather_person(body: Body, fields: Sequence[str]) -> Body:
    """Return a body with its person in `people`, as a `GenerationRequest` has it.

    Args:
        body: of a request; the person's files are values of fields, or parts of a form.
        fields: those of the person.

    Raises:
        RequestError: there are also people.
    """
    data = dict(body.data)
    person: dict[str, Any] = {name: data.pop(name) for name in fields if name in data}
    images = person.pop(IMAGE, None) or []
    images = images if isinstance(images, list) else [images]
    for part in body.parts:
        name = SAME_NAME.sub("", part)
        if name == IMAGE:
            images.append(part)
        elif name in fields:
            person[name] = part
    if data.get("people"):
        if images or person:
            raise RequestError("set either {0} or {1}, not both.", IMAGE, "people")
        return Body(data, body.parts)
    return Body({**data, "people": [{"images": images, **person}]}, body.parts)


def rename_person(fields: Sequence[str]) -> dict[str, str]:
    """Return path of a field -> its name in the body that `gather_person` gets."""
    return {f"people.{'images' if name == IMAGE else name}": name for name in fields}


def translate_person(body: Body) -> Fields:
    """Return the fields of a request for an identity, as those of a generation.

    Raises:
        RequestError: a field has another purpose.
    """
    for name in body.data:
        if name not in ("people", "model", "method"):
            raise RequestError("{0} does not belong to an identity; leave it out.", name)
    people = body.data.get("people")
    if isinstance(people, list) and len(people) > 1:
        raise RequestError(
            f"an identity is that of one person, and {{0}} has {len(people)}; send a request for "
            "each.",
            "people",
        )
    fields = translate({**body.data, "prompt": "portrait"})
    fields.names.update(rename_person(IDENTITY_FIELDS))
    return fields


def convert_person_mask(files: dict[str, Content], limits: Limits) -> None:
    """Turn OpenAI's mask of an edit into one that is white where to edit.

    Args:
        files: path of a field -> its file.
        limits: of the files.

    Raises:
        ImageError: it cannot be decoded.
    """
    mask = files.get(MASK_PATH)
    if isinstance(mask, bytes):
        files[MASK_PATH] = convert_mask(mask, MASK, limits)
