"""The values of the page's form, and the request they describe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openpulid.pipelines.presets import Preset
from openpulid.pipelines.request import GenerationRequest, parse_size
from openpulid.pipelines.request_fields import DEFAULT_FACE_ORDER, RequestError
from openpulid.pipelines.request_inputs import Person
from openpulid.web.add_ons import CONTROL_PREFIXES, describe_add_ons
from openpulid.web.fields import FIELDS, Field
from openpulid.web.masks import PAINT, split_colors
from openpulid.web.regions import PERSON_PREFIXES, describe_regions

TYPED_PATHS = ("style_model", *(f"{prefix}control" for prefix in CONTROL_PREFIXES))
"""Components in which a visitor can type a path, which messages show as it is."""

Uploads = Sequence[tuple[str, str | None]] | None
"""Files of a gallery and their captions."""


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

    @property
    def has_group(self) -> bool:
        """Whether the form describes several people, each in a region."""
        is_edited = self.mode == "edit"
        return self.mode == "people" or (is_edited and bool(self.values.get("several")))

    @property
    def people(self) -> list[str]:
        """The prefixes of the people of the request, in its order."""
        prefixes = PERSON_PREFIXES if self.has_group else ("",)
        return [prefix for prefix in prefixes if self.person(prefix)]

    def files(self) -> list[str]:
        """Return the files of all uploads."""
        uploads = [value for name, value in self.values.items() if name not in TYPED_PATHS]
        return list(_find_files(uploads))

    def person(self, prefix: str = "") -> dict[str, Any]:
        """Return one person as a part of a request; it is empty without a file.

        Args:
            prefix: of the names of the person's components.
        """
        images = image_paths(self.values.get(prefix + "reference_images"))
        identity = self.values.get(prefix + "identity_file")
        if not images and not identity:
            return {}
        order = self.values.get(prefix + "face_order") or DEFAULT_FACE_ORDER
        # in an order of one's own, the first face of the images is a choice
        default_index = 0 if images and order != DEFAULT_FACE_ORDER else None
        face_index = self.values.get(prefix + "face_index") or default_index
        return {
            "images": images,
            "identity": identity,
            "face_index": face_index,
            "face_order": order,
        }

    def reference(self, prefix: str = "") -> Person:
        """Return a person with reference images, see `person`.

        Raises:
            RequestError: there are no images.
        """
        person = self.person(prefix)
        if not person or person["identity"]:
            raise RequestError("add reference images; an identity file contains no images.")
        return Person.model_validate(person)

    def to_request(
        self, preset: Preset, directory: Path, allow_paths: bool = False
    ) -> GenerationRequest:
        """Build the request. Options with the preset's defaults are left out.

        Args:
            preset: the preset and method of the form.
            directory: where masks are written.
            allow_paths: whether text fields may name files of the server.

        Raises:
            RequestError: values are out of range or do not go together.
        """
        data: dict[str, Any] = {
            "people": self._describe_people(preset, directory),
            "model": preset.selection,
            **describe_add_ons(self.values, preset, allow_paths),
        }
        if self.mode == "edit":
            data["init_image"] = self._describe_init_image(directory)
        if size := (self.values.get("size") or "").strip():
            data["width"], data["height"] = parse_size(size)
        for entry in FIELDS:
            default = entry.default(preset)
            value = self.values.get(entry.name, default)
            if value is None:  # a number that was deleted
                value = default
            is_unchanged = entry.is_option and value == default
            if self._has_effect(entry, preset) and not is_unchanged:
                _set(data, entry, value)
        return GenerationRequest.model_validate(data)

    def _has_effect(self, entry: Field, preset: Preset) -> bool:
        """Whether a field belongs to the request."""
        if entry.section == "edit" and self.mode != "edit":
            return False
        if entry.path.startswith("refine_faces.") and not self.values.get("refine_faces"):
            return False
        # without a person, options of the identity would be noted as having no effect
        if entry.path.startswith("identity.") and not self.people:
            return False
        return entry.is_supported(preset)

    def _describe_people(self, preset: Preset, directory: Path) -> list[dict[str, Any]]:
        people = [self.person(prefix) for prefix in self.people]
        if not self.has_group:
            return people
        for prefix, person in zip(self.people, people, strict=True):
            scale = str(self.values.get(prefix + "scale") or "").strip()
            person["scale"] = scale or None
        if preset.models.supports_masks:  # otherwise the page shows no regions
            regions = describe_regions(self.values, self.people, directory)
            for person, region in zip(people, regions, strict=True):
                person |= region
        return people

    def _describe_init_image(self, directory: Path) -> dict[str, Any]:
        canvas = self.values.get("edit_image") or {}
        data: dict[str, Any] = {}
        if canvas.get("background"):
            data["image"] = canvas["background"]
        (painted,) = split_colors(canvas, [PAINT], directory)
        mask = self.values.get("edit_mask")
        if painted and mask:
            raise RequestError(
                "{0} is painted, and there is a mask file; leave one out.", "init_image.mask"
            )
        if painted or mask:
            data["mask"] = painted or mask
        return data


def _set(data: dict[str, Any], entry: Field, value: Any) -> None:
    """Set the value of a field in the data of a request, after a check of the page's limits."""
    if entry.limits is not None and not entry.is_within_limits(value or 0):
        low, high = entry.limits
        bound = f"at least {low:g}" if (value or 0) < low else f"at most {high:g}"
        raise RequestError(f"{{0}} must be {bound} on this page, got {value:g}.", entry.path)
    if entry.name == "seed":
        value = parse_seed(value)
    if entry.name == "prompt":
        value = value or " "  # which is refused with a sentence
    *parents, last = entry.path.split(".")
    for name in parents:
        if not isinstance(data.get(name), dict):  # missing, or a switch that is on
            data[name] = {}
        data = data[name]
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
