"""PuLID for FLUX in the fields of fal's and Replicate's APIs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from openpulid.pipelines.request_fields import Prompt, RequestError, Side, quote
from openpulid.pipelines.request_part import RequestPart
from openpulid.service.api.fields import AnswerOptions, Fields, translate

FAL_SIZES = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
"""fal's names of sizes -> width and height in pixels."""

IMAGE_NAMES = ("reference_image_url", "main_face_image")
"""fal's and Replicate's name of the reference image."""


class FalSize(RequestPart):
    """A size of fal's API, in pixels."""

    width: Side
    height: Side


class FalRequest(RequestPart):
    """A request of fal's or Replicate's API for PuLID on FLUX.

    Attributes:
        prompt: what to generate.
        reference_image_url: fal: the person, as a data: URL.
        main_face_image: Replicate: the same.
        image_size: fal: one of `FAL_SIZES`, or width and height.
        width, height: Replicate: in pixels.
        num_inference_steps: fal: sampling steps.
        num_steps: Replicate: the same.
        guidance_scale: guidance.
        negative_prompt: with `true_cfg` above 1.
        true_cfg: scale of classifier-free guidance.
        id_weight: identity scale.
        start_step: step from which the identity acts.
        max_sequence_length: longest prompt in tokens of T5.
        seed: drawn if it is left out.
        num_outputs: Replicate: number of images.
        output_format: Replicate: of the images.
        output_quality: Replicate: of JPEG and WebP.
        sync_mode: fal: return the images themselves, not their addresses.
        enable_safety_checker: fal: without effect; there is no safety checker.
        model: a preset of this server; not in either API.
    """

    prompt: Prompt
    reference_image_url: str | None = None
    main_face_image: str | None = None
    image_size: FalSize | Literal[tuple(FAL_SIZES)] | None = None  # type: ignore[valid-type]
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: Prompt | None = None
    true_cfg: float | None = None
    id_weight: float | None = None
    start_step: int | None = None
    max_sequence_length: int | None = None
    seed: int | None = None
    num_outputs: int | None = None
    output_format: Literal["png", "jpg", "jpeg", "webp"] = "png"
    output_quality: int | None = Field(default=None, ge=0, le=100)
    sync_mode: bool = False
    enable_safety_checker: bool | None = None
    model: str | None = None

    @field_validator("image_size", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        """Check a size here: pydantic reports each kind of it, by the names of classes."""
        if isinstance(value, Mapping):
            return FalSize.model_validate(value)
        if value is not None and value not in tuple(FAL_SIZES):
            raise RequestError(
                f"{{0}} must be {', '.join(FAL_SIZES)}, or an object with width and height, got "
                f"{quote(value)}.",
                "",
            )
        return value

    def to_answer_options(self) -> AnswerOptions:
        """Return how the images are returned."""
        output_format = "jpeg" if self.output_format == "jpg" else self.output_format
        quality = None if output_format == "png" else self.output_quality
        return AnswerOptions(output_format=output_format, output_compression=quality)

    def to_fields(self) -> Fields:
        """Return the fields of a `GenerationRequest`.

        Raises:
            RequestError: fields exclude each other, or there is no reference image.
        """
        own = (*IMAGE_NAMES, "image_size", "output_format", "output_quality")
        body = self.model_dump(
            exclude={*own, "sync_mode", "enable_safety_checker"}, exclude_none=True
        )
        images = [getattr(self, name) for name in IMAGE_NAMES if getattr(self, name)]
        if len(images) != 1:
            raise RequestError("set one of {0} and {1} to a data: URL of the person.", *IMAGE_NAMES)
        body["people"] = [{"images": images}]
        if self.image_size is not None:
            size = self.image_size
            sides = (size.width, size.height) if isinstance(size, FalSize) else FAL_SIZES[size]
            if "width" in body or "height" in body:
                raise RequestError(
                    "set either {0}, or {1} and {2}.", "image_size", "width", "height"
                )
            body["width"], body["height"] = sides
        fields = translate(body)
        fields.names["people.images"] = next(name for name in IMAGE_NAMES if getattr(self, name))
        return fields


class FalImage(BaseModel):
    """An image of fal's API."""

    url: str
    width: int
    height: int
    content_type: str


class FalAnswer(BaseModel):
    """An answer of fal's API. `has_nsfw_concepts` is missing: there is no safety checker."""

    images: list[FalImage]
    timings: dict[str, float]
    seed: int
    prompt: str
