"""The values of the page's form, and the request they describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openpulid.errors import OptionError
from openpulid.pipelines.request import GenerationRequest, ModelSelection, parse_size

FIELD_LABELS = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "seed": "Seed",
    "num_images": "Images",
    "identity.scale": "Scale",
    "identity.start": "Identity start",
    "identity.end": "Identity end",
    "people.images": "Reference images",
    "people.identity": "Identity file",
    "people.face_index": "Face",
    "controls": "ControlNet",
    "controls.model": "ControlNet",
    "controls.image": "Control image",
    "controls.scale": "ControlNet scale",
    "model.preset": "Preset",
    "model.method": "Method",
}
"""Fields of a `GenerationRequest` and their labels on the page, for error messages."""

Uploads = Sequence[tuple[str, str | None]] | None
"""Files of a gallery and their captions."""


@dataclass(frozen=True)
class FormValues:
    """The values of the form, as Gradio passes them. 0 and "" stand for the preset's default."""

    reference_images: Uploads
    identity_file: str | None
    face_index: float | None
    prompt: str
    preset: str
    method: str
    scale: float
    num_images: float
    seed: float
    also_without_identity: bool
    negative_prompt: str | None
    num_inference_steps: float | None
    guidance_scale: float | None
    size: str | None
    start: float
    end: float
    control: str | None = None
    control_image: str | None = None
    control_scale: float = 1.0

    def to_request(self, models: ModelSelection) -> GenerationRequest:
        """Build the request.

        Args:
            models: the models of the selected preset and method.

        Raises:
            OptionError: values are out of range or do not go together.
        """
        size = (self.size or "").strip()
        width, height = parse_size(size) if size else (None, None)
        people = self._people()
        # the sliders always have values, which have no effect without a person
        identity = {"scale": self.scale, "start": self.start, "end": self.end} if people else {}
        return GenerationRequest.model_validate(
            {
                "prompt": self.prompt or " ",
                "negative_prompt": self.negative_prompt or None,
                "seed": self.seed,
                "num_images": self.num_images,
                "width": width,
                "height": height,
                "num_inference_steps": self.num_inference_steps or None,
                "guidance_scale": self.guidance_scale or None,
                "people": people,
                "controls": self._controls(),
                "identity": identity,
                "model": models,
            }
        )

    def _people(self) -> list[dict[str, Any]]:
        images = image_paths(self.reference_images)
        if not images and not self.identity_file:
            return []
        face_index = self.face_index or None
        return [{"images": images, "identity": self.identity_file, "face_index": face_index}]

    def _controls(self) -> list[dict[str, Any]]:
        if not self.control and not self.control_image:
            return []
        control: dict[str, Any] = {"scale": self.control_scale}
        if self.control:
            control["model"] = self.control
        if self.control_image:
            control["image"] = self.control_image
        return [control]


@dataclass(frozen=True)
class PreviewValues:
    """The values of the form that a preview of the faces needs."""

    reference_images: Uploads
    identity_file: str | None
    face_index: float | None
    preset: str
    method: str

    def images(self) -> list[str]:
        """Return the files of the reference images.

        Raises:
            OptionError: there are none.
        """
        paths = image_paths(self.reference_images)
        if self.identity_file or not paths:
            raise OptionError(
                "add reference images to preview their faces; an identity file contains no images."
            )
        return paths


def image_paths(uploads: Uploads) -> list[str]:
    """Return the files of a gallery."""
    return [path for path, _ in uploads or ()]
