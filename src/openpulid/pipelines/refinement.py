"""A second pass on faces that come out small: crop, enlarge, inpaint with the identity, put back.

A small face has few latents. In a crop around the face it has as many as in a portrait.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.errors import OptionError
from openpulid.faces.face import Face, sort_faces
from openpulid.identity.detection import FaceDetection, MiniFaceDetection, PhotoFaceDetection
from openpulid.identity.identity import Identity
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size
from openpulid.methods.pulid import People, convert_mask, normalize_people
from openpulid.pipelines.init_image import InitImageInput
from openpulid.pipelines.inputs import RequestInputs
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.request import MAX_SEED, GenerationRequest
from openpulid.pipelines.request_inputs import InitImage
from openpulid.pipelines.weights import resolve_path

logger = logging.getLogger(__name__)

MIN_COVER = 0.5
"""Share of a face that must be in a person's region, or in the inpaint mask."""

MASK_MARGIN = 0.15
"""How far the mask reaches beyond the face's box, as a share of the box's longer side."""

FEATHER = 0.08
"""Radius of the mask's soft border, as a share of the box's longer side."""


def load_detection(models: ModelSet) -> FaceDetection:
    """Load the face detector of a preset alone, on the CPU: it takes no memory of an accelerator.

    Raises:
        WeightsError: it is missing or damaged.
    """
    kind = MiniFaceDetection if models.is_miniature else PhotoFaceDetection
    return kind.load(resolve_path(models.detector), "cpu")


@dataclass(frozen=True, eq=False)
class SmallFace:
    """A face to refine.

    Attributes:
        request: the resolved request of the second pass.
        identity: the person whose face it is; None without people.
        window: left, top, right and bottom of the square crop, in pixels of the image.
        mask: gray, of the size of the crop in the image; white where the face is painted anew.
    """

    request: GenerationRequest
    identity: Identity | None
    window: tuple[int, int, int, int]
    mask: Image.Image

    def cut(self, image: Image.Image) -> RequestInputs:
        """Cut the crop out of an image, enlarged to the size of the second pass."""
        size = (self.request.width or 1, self.request.height or 1)
        crop = image.crop(self.window).resize(size, Image.Resampling.LANCZOS)
        # everything that `paste` mixes is painted
        mask = self.mask.point(lambda value: 255 if value else 0).resize(size)
        return RequestInputs(init_image=InitImageInput(crop, mask))

    def paste(self, image: Image.Image, crop: Image.Image) -> Image.Image:
        """Return the image with a refined crop; outside of the mask it is the same."""
        refined = image.copy()
        refined.paste(crop.resize(self.mask.size, Image.Resampling.LANCZOS), self.window, self.mask)
        return refined


class FaceRefiner:
    """Decides which faces of the images of a request are refined, and whose they are.

    Each person has one face: the largest of those that are mostly in the person's region. All
    others stay as they are. Without people, all small faces are refined.

    Args:
        request: a resolved request with `refine_faces`.
        people: its people, as the adapter accepts them.
        inputs: its other input files.
        models: the models that run it.

    Raises:
        OptionError: there is one person per image of a batch.
    """

    def __init__(
        self,
        request: GenerationRequest,
        people: People | None,
        inputs: RequestInputs,
        models: ModelSet,
    ) -> None:
        prompts = [] if people is None else normalize_people(people)
        if len(prompts) > 1:
            raise OptionError("refine_faces needs people with masks, not one for each image.")
        self.request = request
        self.people = prompts[0] if prompts else []
        self.inputs = inputs
        self.models = models

    def find_faces(
        self, image: Image.Image, detection: FaceDetection, seed: int
    ) -> list[SmallFace]:
        """Return the faces of a generated image to refine, from left to right.

        Args:
            image: the image.
            detection: the face detector.
            seed: of the image. Face k is painted with `seed + k`.
        """
        assert self.request.refine_faces is not None
        faces = _detect(detection, image)
        if not faces:
            logger.warning("seed %d: no face detected, so no face is refined", seed)
        limit = self.request.refine_faces.max_size * min(image.size)
        area = self._inpaint_mask(image.size)
        chosen = [
            (face, identity, scale)
            for face, identity, scale in self._assign(faces, image.size, area)
            if _longer_side(face) < limit and scale > 0
        ]
        chosen.sort(key=lambda choice: float(choice[0].box[0]))
        return [
            self._prepare(face, identity, scale, (seed + number) % (MAX_SEED + 1), area)
            for number, (face, identity, scale) in enumerate(chosen)
        ]

    def _assign(
        self, faces: Sequence[Face], size: tuple[int, int], area: Image.Image | None
    ) -> list[tuple[Face, Identity | None, float]]:
        """Return the faces with their identity and its scale."""
        if area is not None:
            mask = convert_mask(area)
            faces = [face for face in faces if _cover(mask, face, size) > MIN_COVER]
        base = self.request.identity.scale
        scale = max(self.request.identity_scales, default=1.0 if base is None else base)
        if not self.people:
            return [(face, None, 1.0) for face in faces]
        masks = [convert_mask(mask) for _, mask in self.people]
        owners: dict[int, Face] = {}
        for face in sort_faces(faces):
            covers = [_cover(mask, face, size) for mask in masks]
            owner = max(range(len(masks)), key=covers.__getitem__)
            if covers[owner] > MIN_COVER:
                owners.setdefault(owner, face)
        return [
            (face, self.people[owner][0], scale * float(masks[owner].max()))
            for owner, face in owners.items()
        ]

    def _inpaint_mask(self, size: tuple[int, int]) -> Image.Image | None:
        """Return the mask outside of which the image must not change, at its size."""
        init_image, options = self.inputs.init_image, self.request.init_image
        if init_image is None or options is None:
            return None
        return init_image.resize(*size, options.resize).mask

    def _prepare(
        self,
        face: Face,
        identity: Identity | None,
        scale: float,
        seed: int,
        area: Image.Image | None,
    ) -> SmallFace:
        height, width = face.image.shape[1:]
        window = _window(face, self.models.face_share, (width, height))
        mask = _draw_mask(face, window)
        if area is not None:
            mask = ImageChops.multiply(mask, area.crop(window))
        if identity is not None and identity.landmarks is not None:
            # InstantID draws the face where they are
            points = (face.landmarks - face.landmarks.new_tensor(window[:2])) / mask.width
            identity = replace(identity, landmarks=points[None, None].cpu())
        return SmallFace(self._derive_request(scale, seed, (width, height)), identity, window, mask)

    def _derive_request(self, scale: float, seed: int, size: tuple[int, int]) -> GenerationRequest:
        """Return the request of the second pass.

        The identity acts from its first step, since the crop fixes the pose. ControlNets are left
        out, since their image shows the whole scene.
        """
        assert self.request.refine_faces is not None
        # no more pixels than the image has: the second pass must not need more memory
        side = min(self.models.native_side, int((size[0] * size[1]) ** 0.5))
        side -= side % self.models.size_multiple
        identity = {"scale": scale, "start": 0.0, "start_step": None}
        return self.request.model_copy(
            update={
                "seed": seed,
                "num_images": 1,
                "width": side,
                "height": side,
                "people": (),
                "controls": (),
                "init_image": InitImage(
                    image="face.png", strength=self.request.refine_faces.strength, mask="mask.png"
                ),
                "refine_faces": None,
                "identity": self.request.identity.model_copy(update=identity),
            }
        )


def _detect(detection: FaceDetection, image: Image.Image) -> list[Face]:
    """Detect the faces of an image, in pixels of the image."""
    reduced = image
    if detection.max_image_size is not None:
        reduced = limit_size(image, detection.max_image_size)
    scale = image.width / reduced.width
    pixels = to_tensor([image])[0]
    return [
        replace(face, image=pixels, box=face.box * scale, landmarks=face.landmarks * scale)
        for face in detection.detect_all(to_tensor([reduced])[0])
    ]


def _longer_side(face: Face) -> float:
    return float((face.box[2:] - face.box[:2]).max())


def _cover(mask: Tensor, face: Face, size: tuple[int, int]) -> float:
    """Return the share of a face in the region of a mask (H, W) with any largest value."""
    width, height = size
    full = interpolate(mask[None, None], (height, width), mode="bilinear")[0, 0]
    x1, y1, x2, y2 = (round(value) for value in face.box.tolist())
    inside = full[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
    return float(inside.mean() / full.max().clamp(min=1e-6))


def _window(face: Face, share: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the square around a face in which it has its share, moved into the image."""
    side = min(round(_longer_side(face) / share), *size)
    center = ((face.box[:2] + face.box[2:]) / 2).tolist()
    left, top = (
        max(0, min(round(position - side / 2), length - side))
        for position, length in zip(center, size, strict=True)
    )
    return left, top, left + side, top + side


def _draw_mask(face: Face, window: tuple[int, int, int, int]) -> Image.Image:
    """Draw a soft ellipse that covers the face, in pixels of the crop."""
    left, top, right, bottom = window
    side = _longer_side(face)
    x1, y1, x2, y2 = face.box.tolist()
    margin = MASK_MARGIN * side
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).rounded_rectangle(
        (x1 - margin - left, y1 - margin - top, x2 + margin - left, y2 + margin - top),
        radius=side / 2,
        fill=255,
    )
    return mask.filter(ImageFilter.GaussianBlur(FEATHER * side))
