"""Decode the files of a request under limits, before it is accepted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from openpulid.errors import PulidError
from openpulid.identity.identity import Identity
from openpulid.identity.reference import ReferenceImage
from openpulid.io.decoding import MIN_SIDE
from openpulid.io.images import open_image, open_mask
from openpulid.io.metadata import encode_image
from openpulid.pipelines.add_ons import AddOns
from openpulid.pipelines.embeddings import open_embedding
from openpulid.pipelines.init_image import InitImageInput, check_inpaint_mask
from openpulid.pipelines.inputs import PersonInput, RequestInputs
from openpulid.pipelines.loras import open_lora
from openpulid.pipelines.request import GenerationRequest
from openpulid.service.api.files import Content
from openpulid.service.catalog import Offer
from openpulid.service.config import Limits

TENSOR_FIELDS = (".identity", ".model", ".file")
"""Last parts of the fields of safetensors files."""

TRANSPARENT = 128
"""From here on a pixel of a mask is transparent: half of an 8-bit level."""


class FileChecker:
    """Opens the files of a request once, as the models will.

    Args:
        files: path of a field -> its file.
        offer: the preset and method.
        limits: of the files.
    """

    def __init__(self, files: Mapping[str, Content], offer: Offer, limits: Limits) -> None:
        self.files = files
        self.offer = offer
        self.limits = limits

    def open(self, request: GenerationRequest) -> RequestInputs:
        """Open all files; return those that are needed before the request runs.

        Args:
            request: its files are paths of fields.

        Raises:
            PulidError: a file is of another kind, damaged, too large, or for other models.
        """
        for control in request.controls:
            self._open_image(control.image, min_side=1)
        if request.style_image is not None:
            self._open_image(request.style_image.image, min_side=1)
        identities = self._read_tensor_files(request)
        people = [
            PersonInput(
                identities.get(person.identity or "")
                or [ReferenceImage(field, self._open_image(field)) for field in person.images],
                None if person.mask is None else self._open_mask(person.mask),
            )
            for person in request.people
        ]
        return RequestInputs(people=tuple(people), init_image=self._open_init_image(request))

    def _open_image(self, field: str, min_side: int = MIN_SIDE) -> Image.Image:
        return open_image(self._content(field), min_side=min_side, **_limit(field, self.limits))

    def _open_mask(self, field: str) -> Image.Image:
        return open_mask(self._content(field), **_limit(field, self.limits))

    def _content(self, field: str) -> bytes:
        content = self.files[field]
        assert isinstance(content, bytes)
        return content

    def _read_tensor_files(self, request: GenerationRequest) -> dict[str, Identity]:
        """Check identities, LoRAs and embeddings, whose libraries read files, not bytes.

        Returns:
            Path of a field -> its identity.
        """
        fields = [field for field in self.files if field.endswith(TENSOR_FIELDS)]
        if not fields:
            return {}
        with TemporaryDirectory() as folder:
            paths = {field: self._place(field, Path(folder)) for field in fields}
            with name_fields(paths):
                placed = request.with_files(paths)
                add_ons = AddOns(
                    tuple(map(open_lora, placed.loras)),
                    tuple(map(open_embedding, placed.embeddings)),
                )
                add_ons.check(self.offer.preset.models)
                return {
                    field: Identity.load(path, self.offer.identity_models)
                    for field, path in paths.items()
                    if field.endswith(".identity")
                }

    def _place(self, field: str, folder: Path) -> Path:
        """Return a file with the content of a field."""
        content = self.files[field]
        if isinstance(content, Path):
            return content
        path = folder / f"{field}.safetensors"
        path.write_bytes(content)
        return path

    def _open_init_image(self, request: GenerationRequest) -> InitImageInput | None:
        part = request.init_image
        if part is None:
            return None
        image = self._open_image(part.image, min_side=1)
        mask = None if part.mask is None else self._open_mask(part.mask)
        if mask is not None:
            check_inpaint_mask(mask)
        return InitImageInput(image, mask)


@contextmanager
def name_fields(paths: Mapping[str, Path]) -> Iterator[None]:
    """Name fields of a request in errors, not the paths of their files.

    Args:
        paths: path of a field -> file.
    """
    try:
        yield
    except PulidError as error:
        message = str(error)
        for field, path in paths.items():
            message = message.replace(str(path), field)
        raise PulidError(message) from None


def _limit(field: str, limits: Limits) -> dict[str, Any]:
    """Return the arguments of `open_image` and `open_mask` for an uploaded file."""
    return {
        "name": field,
        "max_bytes": limits.file_bytes,
        "max_pixels": limits.pixels,
        "time_limit": limits.decode_seconds,
    }


def convert_mask(content: bytes, field: str, limits: Limits) -> bytes:
    """Turn a mask in OpenAI's convention, transparent where to edit, into one that is white there.

    A mask without transparent pixels is white there already.

    Args:
        content: of an image file.
        field: for messages.
        limits: of the file.

    Returns:
        The content of a PNG file.

    Raises:
        ImageError: it cannot be decoded.
    """
    # a pixel of opacity a is shown on white by one of the two, and on black by the other
    options = _limit(field, limits)
    on_black = open_mask(content, **options)
    on_white = open_image(content, min_side=1, **options).convert("L")
    transparency = ImageChops.subtract(on_white, on_black)
    is_transparent = bool(np.asarray(transparency).max() >= TRANSPARENT)
    return encode_image(transparency if is_transparent else on_black, source_type=None)
