"""What the page calls the fields of a request, and its advice, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from openpulid.web.fields import FIELDS

FIELD_LABELS = {entry.path: entry.label for entry in FIELDS} | {
    "width": "width",
    "height": "height",
    "people.images": "Reference images",
    "people.identity": "Identity file",
    "people.face_index": "Face",
    "people.face_order": "Order of the faces",
    "people.mask": "Region",
    "people.box": "Region",
    "people.scale": "Scale of the person",
    "init_image.image": "Image to edit",
    "init_image.mask": "Area that changes",
    "controls": "ControlNet",
    "controls.model": "ControlNet",
    "controls.image": "Control image",
    "controls.scale": "ControlNet scale",
    "controls.kind": "What the ControlNet follows",
    "controls.is_map": "Control image or any other",
    "controls.start": "ControlNet start",
    "controls.end": "ControlNet end",
    "style_image": "Style image",
    "style_image.image": "Style image",
    "style_image.model": "IP-Adapter",
    "style_image.scale": "Style scale",
    "loras": "LoRAs",
    "loras.model": "LoRAs",
    "loras.scale": "LoRA scale",
    "embeddings": "Textual inversion",
    "embeddings.file": "Textual inversion",
    "embeddings.token": "Words of textual inversion",
    "model.preset": "Preset",
    "model.method": "Method",
}
"""Fields of a `GenerationRequest` and their labels on the page, for error messages."""

PAGE_ADVICE = {
    "`pulid world words` lists them": "see Words that the miniature knows",
    "`pulid world person` draws one": "the button Invent a person draws one",
    "create one: `pulid identify IMAGE -o FILE`": "add the reference images instead",
    "re-create it from its images with `pulid identify` and this preset": (
        "add the reference images instead"
    ),
    "create it again with `pulid identify`": "add the reference images instead",
}
"""Advice of messages for the command line, and the same for the page."""


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
