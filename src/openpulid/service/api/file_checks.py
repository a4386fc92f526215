"""Decode the images of a request under limits, before it is accepted."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from openpulid.identity.reference import ReferenceImage
from openpulid.io.decoding import MIN_SIDE
from openpulid.pipelines.init_image import InitImageInput, fit_inpaint_mask
from openpulid.pipelines.inputs import PersonInput, RequestInputs
from openpulid.pipelines.request import GenerationRequest
from openpulid.service.api.decoding import decode_image, decode_mask
from openpulid.service.api.files import Content
from openpulid.service.api.tensor_files import read_tensor_files
from openpulid.service.catalog import Offer
from openpulid.service.config import Limits


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
        identities = read_tensor_files(request, self.files, self.offer)
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
        return decode_image(self._content(field), field, self.limits, min_side)

    def _open_mask(self, field: str) -> Image.Image:
        return decode_mask(self._content(field), field, self.limits)

    def _content(self, field: str) -> bytes:
        content = self.files[field]
        assert isinstance(content, bytes)
        return content

    def _open_init_image(self, request: GenerationRequest) -> InitImageInput | None:
        part = request.init_image
        if part is None:
            return None
        image = self._open_image(part.image, min_side=1)
        mask = None
        if part.mask is not None:
            mask = fit_inpaint_mask(self._open_mask(part.mask), image)
        return InitImageInput(image, mask)
