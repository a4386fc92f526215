"""Check the fields and files of a request, and build a `GenerationRequest`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from openpulid.pipelines.request import GenerationRequest
from openpulid.service.api.backend import Backend
from openpulid.service.api.checks import check_request
from openpulid.service.api.fields import Fields
from openpulid.service.api.files import Content, FileTaker

Convert = Callable[[dict[str, Content]], None]
"""Changes the files of a request, path of a field -> file."""


@dataclass(frozen=True)
class Accepted:
    """A request that has passed all checks.

    Attributes:
        request: its files are paths of fields.
        files: path of a field -> its file.
        batch_key: images of requests with equal keys can run as one batch; None: alone.
    """

    request: GenerationRequest
    files: Mapping[str, Content]
    batch_key: str | None


def accept(
    backend: Backend,
    owner: str,
    fields: Fields,
    parts: Mapping[str, bytes],
    convert: Convert | None = None,
) -> Accepted:
    """Check a request completely.

    Args:
        backend: the presets, limits and identities.
        owner: name of the API key.
        fields: of the request, under their own names.
        parts: name of a part of a form -> its content.
        convert: changes the files before they are read.

    Raises:
        RequestError: the request is invalid.
        PulidError: a file of the request cannot be used.
    """
    limits = backend.config.limits
    offer = backend.catalog.find(fields.preset, fields.method)

    def find_identity(name: str) -> Path | None:
        stored = backend.identities.get(owner, name)
        return None if stored is None else stored.file

    taker = FileTaker(parts, find_identity, limits)
    data = {**taker.take(fields.data), "model": offer.preset.selection}
    if convert is not None:
        convert(taker.files)
    request = GenerationRequest.model_validate(data)
    taker.check_taken(request)
    key = check_request(request, taker.files, offer, limits)
    return Accepted(request, taker.files, key)
