"""Reference images of a person: decoded once, faces detected once, used for everything after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from openpulid.errors import FaceError, OptionError
from openpulid.faces.face import (
    Face,
    check_order,
    describe_defects,
    describe_faces,
    draw_faces,
    select_face,
    sort_faces,
)
from openpulid.identity.extractor import IdentityExtractor
from openpulid.identity.identity import Identity, check_fusion, fuse_identities
from openpulid.identity.similarity import HasFaceRecognition, compare_identities, describe_strangers
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import (
    Source,
    image_label,
    is_image_source,
    limit_size,
    open_image,
)

logger = logging.getLogger(__name__)


def check_options(order: str, fusion: str) -> None:
    """Refuse an unknown order of faces or fusion of identities, before an image is read.

    Raises:
        OptionError: there is no such order or fusion.
    """
    check_order(order)
    check_fusion(fusion)


@dataclass(frozen=True, eq=False)
class ReferenceImage:
    """A decoded image of a person.

    Attributes:
        label: how messages call the image: its path, if it has one.
        image: the image in RGB, upright.
    """

    label: str
    image: Image.Image


ImageSource = Source | Tensor | ReferenceImage


def open_references(
    images: ImageSource | Sequence[ImageSource], time_limit: float | None = None
) -> list[ReferenceImage]:
    """Decode the images of one person. Images that are decoded already are taken as they are.

    Args:
        images: one or several images, as `open_image` accepts them, or `ReferenceImage`.
        time_limit: as for `open_image`.

    Raises:
        ImageError: a file is not an image.
        OptionError: there are no images, or a value is no image.
    """
    sources: Sequence[Any] = [images]
    if isinstance(images, Sequence) and not is_image_source(images):
        sources = images
    if not sources:
        raise OptionError("an identity needs at least one image.")
    return [_open_one(source, time_limit) for source in sources]


def _open_one(image: Any, time_limit: float | None) -> ReferenceImage:
    if isinstance(image, ReferenceImage):
        return image
    return ReferenceImage(image_label(image), open_image(image, time_limit=time_limit))


@dataclass(frozen=True, eq=False)
class DetectedFaces:
    """The faces in one reference image, at least one.

    Attributes:
        label: how messages call the image.
        faces: all faces of the image.
    """

    label: str
    faces: list[Face]


class ReferenceFaces:
    """The faces in the reference images of one person, and the identity they give.

    Args:
        extractor: extracts the identity.
        images: the faces of each image.
    """

    def __init__(self, extractor: IdentityExtractor, images: Sequence[DetectedFaces]) -> None:
        self.extractor = extractor
        self.images = list(images)
        self._logged: set[str] = set()

    @classmethod
    def detect(
        cls, extractor: IdentityExtractor, images: ImageSource | Sequence[ImageSource]
    ) -> ReferenceFaces:
        """Detect the faces in reference images.

        Raises:
            ImageError: a file is not an image.
            FaceError: an image has no face that the extractor knows.
        """
        references = open_references(images)
        return cls(extractor, [_detect_one(extractor, reference) for reference in references])

    def identity(
        self,
        face_index: int | None = None,
        face_order: str = "large-small",
        fusion: str = "concat",
        weights: Sequence[float] | None = None,
    ) -> Identity:
        """Extract the identity of the selected face of every image.

        A warning is logged for a face that is small, blurred or not upright, and for an image that
        seems to show another person than the others.

        Args:
            face_index: which face of an image with several, counted from 0 in `face_order`. None
                selects the first, with a warning if there are several.
            face_order: one of `faces.face.ORDERS`.
            fusion: how several images are combined, see `fuse_identities`.
            weights: weights of the images in the fusion.

        Raises:
            FaceError: an image has fewer faces.
            OptionError: there is no such order or fusion.
        """
        faces = [
            select_face(image.faces, face_index, face_order, image.label) for image in self.images
        ]
        for image, face in zip(self.images, faces, strict=True):
            self._log(describe_defects(face, image.label))
        identities = self.extractor.extract(faces)
        if len(identities) > 1 and isinstance(self.extractor, HasFaceRecognition):
            labels = [image.label for image in self.images]
            self._log(describe_strangers(self.extractor, identities, labels))
        return fuse_identities(identities, fusion, weights)

    def similarity(self, identity: Identity, face_index: int | None = None) -> float:
        """Compute the cosine similarity of the selected faces and an identity.

        Args:
            identity: of the same extractor.
            face_index: see `identity`.

        Raises:
            FaceError: an image has fewer faces.
            IdentityError: other models produced the identity.
            OptionError: the features of the extractor have no face embedding.
        """
        identity.require(self.extractor.models)
        return compare_identities(self.extractor, self.identity(face_index), identity)

    def draw(self, face_index: int | None = None, face_order: str = "large-small") -> Image.Image:
        """Draw one row per image: all faces with their numbers, then the extractor's crops.

        Raises:
            FaceError: an image has fewer faces.
            OptionError: there is no such order.
        """
        rows = []
        for image in self.images:
            faces = sort_faces(image.faces, face_order)
            selected = select_face(faces, face_index or 0, face_order, image.label)
            self._log(describe_defects(selected, image.label))
            rows.append(draw_faces(faces, selected, self.extractor.debug_crops(selected)))
        size = (max(row.width for row in rows), sum(row.height for row in rows))
        sheet = Image.new("RGB", size, "white")
        top = 0
        for row in rows:
            sheet.paste(row, (0, top))
            top += row.height
        return sheet

    def describe(self, face_order: str = "large-small") -> list[str]:
        """Describe every face in one line: image, number, position and score.

        Raises:
            OptionError: there is no such order.
        """
        lines = []
        for image in self.images:
            lines += describe_faces(image.faces, face_order, image.label)
        return lines

    def _log(self, notes: Sequence[str]) -> None:
        """Log warnings, each only once."""
        for note in notes:
            if note not in self._logged:
                self._logged.add(note)
                logger.warning("%s", note)


def _detect_one(extractor: IdentityExtractor, reference: ReferenceImage) -> DetectedFaces:
    detection = extractor.detection
    image = reference.image
    reduced = image
    if detection.max_image_size is not None:
        reduced = limit_size(image, detection.max_image_size)
    scale = max(image.size) / max(reduced.size)
    faces = detection.detect(to_tensor([reduced])[0])
    if not faces:
        width, height = image.size
        tried = detection.search_description
        raise FaceError(
            f"{reference.label}: no face detected in its {width} x {height} pixels ({tried}); "
            f"{detection.no_face_hint}",
            reference.label,
            image.size,
            tried,
        )
    return DetectedFaces(reference.label, [replace(face, scale=scale) for face in faces])
