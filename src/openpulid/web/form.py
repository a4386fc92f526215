"""The values of the page's form, and the request they describe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    "controls.kind": "Kind of the control image",
    "model.preset": "Preset",
    "model.method": "Method",
}
"""Fields of a `GenerationRequest` and their labels on the page, for error messages."""

PAGE_ADVICE = {
    "`pulid world person` draws one": "the button Random person draws one",
    "create one: `pulid identify IMAGE -o FILE`": "add the reference images instead",
    "re-create it from its images with `pulid identify` and this preset": (
        "add the reference images instead"
    ),
    "create it again with `pulid identify`": "add the reference images instead",
}
"""Advice of messages for the command line, and the same for the page."""

Uploads = Sequence[tuple[str, str | None]] | None
"""Files of a gallery and their captions."""


def adapt_message(message: str, files: Iterable[str]) -> str:
    """Adapt a message to the page: names of uploads without folders, advice about buttons.

    Args:
        message: of an error or a warning.
        files: the uploads of the form, whose folders are temporary.
    """
    for file in files:
        message = message.replace(file, Path(file).name)
    for advice, page_advice in PAGE_ADVICE.items():
        message = message.replace(advice, page_advice)
    return message


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

    def files(self) -> list[str]:
        """Return the files of all uploads."""
        single = [self.identity_file, self.control_image]
        return image_paths(self.reference_images) + [file for file in single if file]

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

    def files(self) -> list[str]:
        """Return the files of all uploads."""
        single = [self.identity_file] if self.identity_file else []
        return image_paths(self.reference_images) + single

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
