"""A second pass on faces that come out small: crop, enlarge, inpaint with the identity, put back.

A small face has few latents. Enlarged to a portrait, it has enough.
"""

from __future__ import annotations

import logging

from PIL import Image

from openpulid.identity.detection import FaceDetection, detect_in_image
from openpulid.methods.pulid import People, convert_mask
from openpulid.pipelines.factory import load_detection
from openpulid.pipelines.inputs import RequestInputs
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.regions import MIN_COVER, assign_faces, cover_face
from openpulid.pipelines.request import MAX_SEED, GenerationRequest
from openpulid.pipelines.small_face import SmallFace

logger = logging.getLogger(__name__)


class FaceRefiner:
    """Decides which faces of the images of a request are refined, and whose they are.

    Each person has one face: the largest of those that are mostly in the person's region. All
    others stay as they are. Without people, all small faces are refined; with a tuned method, the
    largest face.

    Args:
        request: a resolved request with `refine_faces`.
        people: its people, as the adapter accepts them.
        inputs: its other input files.
        models: the models that run it.
    """

    def __init__(
        self,
        request: GenerationRequest,
        people: People | None,
        inputs: RequestInputs,
        models: ModelSet,
    ) -> None:
        self.request = request
        self.people = people
        self.inputs = inputs
        self.models = models
        # before the first image, which would be lost without it; a tuned method has no extractor
        self.detection: FaceDetection = load_detection(models)

    def find_faces(self, image: Image.Image, seed: int) -> list[SmallFace]:
        """Return the faces of a generated image to refine, from left to right.

        Args:
            image: the image.
            seed: of the image. Face k is painted with `seed + k`.
        """
        assert self.request.refine_faces is not None
        faces = detect_in_image(self.detection, image)
        if not faces:
            logger.warning("seed %d: no face detected, so no face is refined", seed)
        area = self._inpaint_mask(image.size)
        if area is not None:
            mask = convert_mask(area)
            faces = [face for face in faces if cover_face(mask, face, image.size) > MIN_COVER]
        identity = self.request.identity
        base = 1.0 if identity.scale is None else identity.scale
        base = max(self.request.identity_scales, default=base)
        has_person = self.models.has_own_person
        assigned = assign_faces(faces, self.people, image.size, has_person)
        limit = self.request.refine_faces.max_size * min(image.size)
        small = [
            (face, person, base * weight)
            for face, person, weight in assigned
            if face.longer_side < limit and (person is None or base * weight > 0)
        ]
        small.sort(key=lambda entry: float(entry[0].box[0]))
        prepared = []
        for number, (face, person, scale) in enumerate(small):
            update = {
                "seed": (seed + number) % (MAX_SEED + 1),
                "identity": identity.model_copy(update={"scale": scale}),
            }
            request = self.request.model_copy(update=update)
            prepared.append(SmallFace.prepare(face, person, request, area, self.models))
        return prepared

    def _inpaint_mask(self, size: tuple[int, int]) -> Image.Image | None:
        """Return the mask outside of which the image must not change, at its size."""
        init_image, options = self.inputs.init_image, self.request.init_image
        if init_image is None or options is None:
            return None
        return init_image.resize(*size, options.resize).mask
