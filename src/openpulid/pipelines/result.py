"""The images of a generation, and the files that they are saved to."""

from __future__ import annotations

import logging
import os
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from openpulid.identity.identity import Identity
from openpulid.io.files import make_folder, write_new
from openpulid.io.metadata import encode_image
from openpulid.io.xmp import DigitalSourceType
from openpulid.pipelines.file_names import DEFAULT_PATTERN, check_pattern, image_name
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person

if TYPE_CHECKING:
    from openpulid.io.content_credentials import ContentSigner

logger = logging.getLogger(__name__)

UNSAVED_IDENTITY = "unsaved-identity.safetensors"
"""Stands in a request for an identity that was passed as an object."""

THUMBNAIL_SIDE = 384
"""Longest side in pixels of an image in a notebook."""

OnImage = Callable[[Image.Image, GenerationRequest], None]
"""Receives each image as soon as it is generated, with the request that regenerates it alone."""


@dataclass(repr=False)
class GenerationResult:
    """The images of a generation.

    Attributes:
        images: the images.
        requests: for each image the resolved request that regenerates it alone. An identity that
            was passed as an object has the name `UNSAVED_IDENTITY` in it.
        fingerprints: path of a field in the requests -> hash of the input file.
        is_described: whether the requests describe the images. Several people, and masks, that were
            passed as objects cannot be described.
    """

    images: list[Image.Image]
    requests: list[GenerationRequest]
    fingerprints: dict[str, str] = field(default_factory=dict)
    is_described: bool = True

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [request.seed for request in self.requests]

    def __repr__(self) -> str:
        count = len(self.images)
        size = "x".join(map(str, self.images[0].size)) if self.images else "none"
        seeds = ", ".join(map(str, self.seeds[:4])) + (", ..." if count > 4 else "")
        return f"GenerationResult({count} images, size: {size}, seeds: {seeds})"

    def describe_people(self, request: GenerationRequest, people: Any) -> GenerationRequest:
        """Return a request with the people that were passed as objects."""
        if not isinstance(people, Identity):
            self.is_described = False
            return request
        self.fingerprints["people.0.identity"] = people.fingerprint
        person = Person(identity=UNSAVED_IDENTITY)
        return request.model_copy(update={"people": (person,)})

    def _repr_html_(self) -> str:
        """Show the images in a notebook, each with its seed."""
        figures = []
        for image, seed in zip(self.images, self.seeds, strict=True):
            thumbnail = image.copy()
            thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            data = b64encode(encode_image(thumbnail)).decode()
            figures.append(
                '<figure style="display: inline-block; margin: 4px">'
                f'<img alt="image with seed {seed}" src="data:image/png;base64,{data}">'
                f"<figcaption>seed {seed}</figcaption></figure>"
            )
        return "".join(figures) or escape(repr(self))

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        name: str = DEFAULT_PATTERN,
        metadata: bool = True,
        signer: ContentSigner | None = None,
    ) -> list[Path]:
        """Save each image as PNG, with its request for `pulid generate --from`.

        Each file states in XMP that a model has generated the image.

        No existing file is replaced: if there is another image of that name, a number is added.

        Args:
            directory: created if it is missing.
            name: pattern of the names, see `file_names.image_name`; by default the prompt's first
                words and the seed.
            metadata: whether to store the requests.
            signer: adds signed content credentials (C2PA).

        Returns:
            The files, in the order of the images.

        Raises:
            OutputError: a file cannot be written.
            OptionError: the pattern has an unknown field.
        """
        check_pattern(name)
        if metadata and not self.is_described:
            logger.warning(
                "masks and several people that are passed as objects cannot be stored; "
                "the images are saved without their request."
            )
            metadata = False
        return [
            save_generated(
                image,
                request,
                directory,
                self.fingerprints,
                name=name,
                metadata=metadata,
                signer=signer,
            )
            for image, request in zip(self.images, self.requests, strict=True)
        ]


def save_generated(
    image: Image.Image,
    request: GenerationRequest,
    directory: str | os.PathLike[str],
    fingerprints: Mapping[str, str],
    *,
    name: str = DEFAULT_PATTERN,
    metadata: bool = True,
    signer: ContentSigner | None = None,
) -> Path:
    """Save one generated image, see `GenerationResult.save`."""
    parameters = Provenance.create(request, fingerprints).to_metadata() if metadata else None
    folder = Path(directory)
    make_folder(folder)
    content = encode_generated(image, request, parameters, signer)
    return write_new(folder / image_name(request, name), content)


def encode_generated(
    image: Image.Image,
    request: GenerationRequest,
    parameters: Mapping[str, Any] | None = None,
    signer: ContentSigner | None = None,
) -> bytes:
    """Return the content of a PNG file that states how its image was generated.

    Args:
        image: the image.
        request: its request; an initial image makes it an edited one.
        parameters: stored in the file.
        signer: adds content credentials.
    """
    is_edited = request.init_image is not None
    source_type = DigitalSourceType.EDITED if is_edited else DigitalSourceType.GENERATED
    content = encode_image(image, ".png", parameters, source_type)
    return content if signer is None else signer.sign(content, ".png", source_type)
