"""One face of a second pass: its crop, its mask, and the request that inpaints it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from openpulid.faces.face import Face
from openpulid.identity.identity import Identity
from openpulid.pipelines.init_image import InitImageInput
from openpulid.pipelines.inputs import RequestInputs
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import InitImage

MASK_MARGIN = 0.15
"""How far the mask reaches beyond the face's box, as a share of the box's longer side."""

FEATHER = 0.08
"""Radius of the mask's soft border, as a share of the box's longer side."""


@dataclass(frozen=True, eq=False)
class SmallFace:
    """A face to refine.

    Attributes:
        request: the resolved request of the second pass.
        identity: of the person; None without people.
        window: left, top, right and bottom of the square crop, in pixels of the image.
        mask: gray, of the size of the crop in the image; white where the face is repainted.
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

    @classmethod
    def prepare(
        cls,
        face: Face,
        identity: Identity | None,
        request: GenerationRequest,
        area: Image.Image | None,
        models: ModelSet,
    ) -> SmallFace:
        """Prepare the second pass on a face.

        Args:
            face: in pixels of the image.
            identity: of the person.
            request: the resolved request of the image, with the seed and the scale of the face.
            area: mask of the size of the image outside of which it must not change.
            models: the models that run it.
        """
        height, width = face.image.shape[1:]
        window = _window(face, models.face_share, (width, height))
        mask = _draw_mask(face, window)
        if area is not None:
            mask = ImageChops.multiply(mask, area.crop(window))
        if identity is not None and identity.landmarks is not None:
            # InstantID draws the face where they are
            points = (face.landmarks - face.landmarks.new_tensor(window[:2])) / mask.width
            identity = replace(identity, landmarks=points[None, None].cpu())
        return cls(_derive_request(request, (width, height), models), identity, window, mask)


def _derive_request(
    request: GenerationRequest, size: tuple[int, int], models: ModelSet
) -> GenerationRequest:
    """Return the request of the second pass.

    The identity acts from its first step, since the crop fixes the pose. ControlNets are left out,
    since their image shows the whole scene.
    """
    assert request.refine_faces is not None
    # no more pixels than the image has: the second pass must not need more memory
    side = min(models.native_side, int((size[0] * size[1]) ** 0.5))
    side -= side % models.size_multiple
    strength = request.refine_faces.strength
    identity = request.identity.model_copy(update={"start": 0.0, "start_step": None})
    return request.model_copy(
        update={
            "num_images": 1,
            "width": side,
            "height": side,
            "people": (),
            "controls": (),
            "init_image": InitImage(image="face.png", strength=strength, mask="mask.png"),
            "refine_faces": None,
            "identity": identity,
        }
    )


def _window(face: Face, share: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the square around a face in which it has its share, moved into the image."""
    side = min(round(face.longer_side / share), *size)
    center = ((face.box[:2] + face.box[2:]) / 2).tolist()
    left, top = (
        max(0, min(round(position - side / 2), length - side))
        for position, length in zip(center, size, strict=True)
    )
    return left, top, left + side, top + side


def _draw_mask(face: Face, window: tuple[int, int, int, int]) -> Image.Image:
    """Draw a soft ellipse that covers the face, in pixels of the crop."""
    left, top, right, bottom = window
    side = face.longer_side
    x1, y1, x2, y2 = face.box.tolist()
    margin = MASK_MARGIN * side
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).rounded_rectangle(
        (x1 - margin - left, y1 - margin - top, x2 + margin - left, y2 + margin - top),
        radius=side / 2,
        fill=255,
    )
    return mask.filter(ImageFilter.GaussianBlur(FEATHER * side))
