"""The values of the page's form, and the request they describe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.request import GenerationRequest, parse_size
from openpulid.pipelines.request_fields import RequestError
from openpulid.pipelines.request_inputs import Person
from openpulid.web.add_ons import describe_add_ons
from openpulid.web.fields import FIELDS, Field
from openpulid.web.masks import COLOR_NAMES, COLORS, PAINT, split_colors

MAX_PEOPLE = 4
"""People of the tab Several people. A request can have more."""

PERSON_PREFIXES = tuple(f"person{number}_" for number in range(1, MAX_PEOPLE + 1))
"""Of the names of the components of each person."""

PERSON_COLORS = COLOR_NAMES
"""The color in which the region of each person is drawn."""

SIDE_BY_SIDE = "side by side"
"""The region of a person that depends on how many people there are."""
DRAWN = "drawn below"
"""The region that is painted in the color of the person."""
REGIONS = {
    "left half": (0.0, 0.0, 0.5, 1.0),
    "right half": (0.5, 0.0, 1.0, 1.0),
    "upper half": (0.0, 0.0, 1.0, 0.5),
    "lower half": (0.0, 0.5, 1.0, 1.0),
}
"""Boxes by name, as fractions of the image's sides."""


def side_by_side(position: int, count: int) -> tuple[float, float, float, float]:
    """Return the box of one of several people of equal width, counted from the left."""
    return (position / count, 0.0, (position + 1) / count, 1.0)


FIELD_LABELS = {entry.path: entry.label for entry in FIELDS} | {
    "width": "width",
    "height": "height",
    "people.images": "Reference images",
    "people.identity": "Identity file",
    "people.face_index": "Face",
    "people.mask": "Region",
    "people.box": "Region",
    "people.scale": "Scale of the person",
    "init_image.image": "Image to edit",
    "init_image.mask": "Painted area",
    "controls": "ControlNet",
    "controls.model": "ControlNet",
    "controls.image": "Control image",
    "controls.scale": "ControlNet scale",
    "controls.kind": "What the control image shows",
    "controls.is_map": "What the control image shows",
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
    "embeddings.token": "Textual inversion",
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


class FormValues:
    """The values of the form, as Gradio passes them.

    Args:
        values: name of a component -> its value. A missing one is as a new page shows it.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    @property
    def mode(self) -> str:
        """The tab: "create", "edit" or "people"."""
        return self.values.get("mode") or "create"

    @property
    def preset(self) -> str:
        """The name of the preset."""
        return self.values["preset"]

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.values.get("method") or "pulid"

    def files(self) -> list[str]:
        """Return the files of all uploads."""
        return list(_find_files(list(self.values.values())))

    def person(self, prefix: str = "") -> dict[str, Any]:
        """Return one person as a part of a request; it is empty without a file.

        Args:
            prefix: of the names of the person's components.
        """
        images = image_paths(self.values.get(prefix + "reference_images"))
        identity = self.values.get(prefix + "identity_file")
        if not images and not identity:
            return {}
        face_index = self.values.get(prefix + "face_index") or None
        return {"images": images, "identity": identity, "face_index": face_index}

    def reference(self, prefix: str = "") -> Person:
        """Return a person with reference images, see `person`.

        Raises:
            OptionError: there are no images.
        """
        person = self.person(prefix)
        if not person or person["identity"]:
            raise OptionError("add reference images; an identity file contains no images.")
        return Person.model_validate(person)

    def to_request(self, preset: Preset, directory: Path) -> GenerationRequest:
        """Build the request. Options with the preset's defaults are left out.

        Args:
            preset: the preset and method of the form.
            directory: where masks are written.

        Raises:
            OptionError: values are out of range or do not go together.
        """
        people = self._people(directory)
        data: dict[str, Any] = {
            "people": people,
            "model": preset.selection,
            **describe_add_ons(self.values, preset),
        }
        if self.mode == "edit":
            data["init_image"] = self._init_image(directory)
        if size := (self.values.get("size") or "").strip():
            data["width"], data["height"] = parse_size(size)
        for entry in FIELDS:
            is_ignored = (
                not entry.is_supported(preset)
                or (entry.section == "edit" and self.mode != "edit")
                # without a person they would be noted as having no effect
                or (entry.path.startswith("identity.") and not people)
            )
            default = entry.default(preset)
            value = self.values.get(entry.name, default)
            if is_ignored or (entry.is_option and value in (None, default)):
                continue
            _set(data, entry, value)
        return GenerationRequest.model_validate(data)

    def _people(self, directory: Path) -> list[dict[str, Any]]:
        if self.mode != "people":
            person = self.person()
            return [person] if person else []
        prefixes = [prefix for prefix in PERSON_PREFIXES if self.person(prefix)]
        drawn = split_colors(self.values.get("regions"), COLORS, directory)
        people = []
        for position, prefix in enumerate(prefixes):
            region = self.values.get(prefix + "region") or SIDE_BY_SIDE
            place: dict[str, Any] = {"box": REGIONS.get(region)}
            if region == DRAWN:
                number = PERSON_PREFIXES.index(prefix)
                place = {"mask": drawn[number]}
                if drawn[number] is None:
                    raise RequestError(
                        f"{{0}} of person {number + 1} is not drawn yet; draw it below in "
                        f"{PERSON_COLORS[number]}, or choose another region.",
                        "people.mask",
                    )
            elif region == SIDE_BY_SIDE and len(prefixes) > 1:
                place = {"box": side_by_side(position, len(prefixes))}
            scale = self.values.get(prefix + "scale") or None
            people.append({**self.person(prefix), **place, "scale": scale})
        return people

    def _init_image(self, directory: Path) -> dict[str, Any]:
        canvas = self.values.get("edit_image") or {}
        data: dict[str, Any] = {}
        if canvas.get("background"):
            data["image"] = canvas["background"]
        (mask,) = split_colors(canvas, [PAINT], directory)
        if mask is not None:
            data["mask"] = mask
        return data


def _set(data: dict[str, Any], entry: Field, value: Any) -> None:
    """Set the value of a field in the data of a request, after a check of the page's limits."""
    if entry.limits is not None:
        low, high = entry.limits
        if not low <= (value or 0) <= high:
            bound = f"at least {low:g}" if (value or 0) < low else f"at most {high:g}"
            raise RequestError(f"{{0}} must be {bound} on this page, got {value:g}.", entry.path)
    if entry.name == "seed":
        value = parse_seed(value)
    if entry.name == "prompt":
        value = value or " "  # which is refused with a sentence
    *parents, last = entry.path.split(".")
    for name in parents:
        data = data.setdefault(name, {})
    data[last] = value


def parse_seed(value: str | float | None) -> Any:
    """Return the seed of a request; None, which draws one, for a blank text and "random"."""
    if isinstance(value, str):
        value = value.strip()
        return None if value.lower() in ("", "random") else value
    return value


def image_paths(uploads: Uploads) -> list[str]:
    """Return the files of a gallery."""
    return [path for path, _ in uploads or ()]


def _find_files(value: Any) -> Iterator[str]:
    """Yield the paths in a value of the form."""
    if isinstance(value, str) and os.path.isabs(value):
        yield value
    elif isinstance(value, dict):
        yield from _find_files(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _find_files(item)
