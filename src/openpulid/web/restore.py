"""The values of the form that generate an image again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person
from openpulid.web.add_ons import find_unknown, read_add_ons
from openpulid.web.fields import FIELDS
from openpulid.web.file_lines import is_hub_name
from openpulid.web.masks import PAINTED_FILE
from openpulid.web.regions import MAX_PEOPLE, PERSON_PREFIXES, is_drawn, read_region
from openpulid.web.session import WebSession

MODEL_CHANGES = {
    "base": "another base model",
    "adapter": "an adapter of its own",
    "face_pack": "other face models",
}
"""Changes in the models of a preset, which the page gets when it is started."""


@dataclass(frozen=True)
class Restored:
    """The settings of an image.

    Attributes:
        preset: the preset and method that generated it.
        values: name of a component -> its value.
        files: a sentence on the files to add again; empty if there are none.
    """

    preset: Preset
    values: dict[str, Any]
    files: str


def read_image(session: WebSession, file: str) -> Restored:
    """Read the settings of an image.

    Raises:
        PulidError: it has none, or this page cannot show them.
    """
    provenance = Provenance.read(file)
    preset = _find_preset(session, provenance)
    values = read_values(provenance.request, preset)
    return Restored(preset, values, describe_files(provenance))


def read_values(request: GenerationRequest, preset: Preset) -> dict[str, Any]:
    """Return name of a component -> its value, for all values that need no file.

    Args:
        request: the resolved request of an image.
        preset: the preset and method that the request selects.

    Raises:
        OptionError: the page cannot show the request.
    """
    values: dict[str, Any] = {}
    unknown = find_unknown(request)
    for entry in FIELDS:
        value = entry.read(request) if entry.is_supported(preset) else None
        if value is not None:
            values[entry.name] = value
            unknown += [] if entry.is_within_limits(value) else [f"{entry.label} {value:g}"]
    scale = next(entry for entry in FIELDS if entry.name == "scale")
    unknown += [
        f"{scale.label} {person.scale:g}"
        for person in request.people
        if person.scale is not None and not scale.is_within_limits(person.scale)
    ]
    _refuse(unknown)
    values["seed"] = str(request.seed)  # browsers round integers above 2^53
    values["mode"] = find_mode(request)
    values["several"] = values["mode"] == "edit" and is_group(request)
    if request.width and request.height:
        values["size"] = f"{request.width}x{request.height}"
    values |= read_add_ons(request)
    if is_group(request):
        values |= _read_people(request)
    elif request.people:
        (person,) = request.people
        values |= _read_face(person)
        if person.scale is not None:
            values["scale"] = person.scale
    return values


def _refuse(unknown: Sequence[str]) -> None:
    """Raise OptionError if an image has something that the page does not have."""
    if unknown:
        raise OptionError(
            f"the image was generated with {' and '.join(unknown)}, which this page does not have; "
            "use `pulid generate --from` for it."
        )


def is_group(request: GenerationRequest) -> bool:
    """Whether a request shows several people, or one in a region."""
    return len(request.people) > 1 or any(person.has_region for person in request.people)


def find_mode(request: GenerationRequest) -> str:
    """Return the tab that can describe a request.

    Raises:
        OptionError: there is none.
    """
    if len(request.people) > MAX_PEOPLE:
        raise OptionError(f"the image shows more than the {MAX_PEOPLE} people of this page.")
    if request.init_image is not None:
        return "edit"
    return "people" if is_group(request) else "create"


def _read_people(request: GenerationRequest) -> dict[str, Any]:
    values: dict[str, Any] = {}
    count = len(request.people)
    for position, person in enumerate(request.people):
        prefix = PERSON_PREFIXES[position]
        values[prefix + "region"] = read_region(person, position, count)
        values[prefix + "scale"] = "" if person.scale is None else str(person.scale)
        values |= _read_face(person, prefix)
    return values


def _read_face(person: Person, prefix: str = "") -> dict[str, Any]:
    return {
        prefix + "face_index": person.face_index or 0,
        prefix + "face_order": person.face_order,
    }


def _find_preset(session: WebSession, provenance: Provenance) -> Preset:
    """Return the installed preset of an image.

    Raises:
        OptionError: it is not installed, or the image was generated with other models.
    """
    model = provenance.request.model
    if model is None or model.preset not in session.preset_names():
        name = "none" if model is None else model.preset
        raise OptionError(
            f"the image was generated with the preset {name}, which is not installed; "
            f"installed: {', '.join(session.preset_names())}."
        )
    preset = session.preset(session.select_models(model.preset, model.method or "pulid"))
    if preset.models.method not in session.method_names(preset):
        raise OptionError(f"the image was generated with {model.method}, which is not installed.")
    _refuse(
        [
            description
            for name, description in MODEL_CHANGES.items()
            if _file_name(getattr(model, name)) != _file_name(getattr(preset.selection, name))
        ]
    )
    return preset


def _file_name(path: str | Path | None) -> str | None:
    """Return the name of a file or folder; images do not store where it was."""
    return None if path is None else Path(path).name


def describe_files(provenance: Provenance) -> str:
    """Return a sentence on the files to add again; empty if there are none."""
    files = provenance.required_files()
    drawn = [field for field, name in files.items() if _is_painted(field, name)]
    again = [name for field, name in files.items() if field not in drawn and not is_hub_name(name)]
    sentences = []
    if again:
        sentences.append(f"Add the same files again: {', '.join(dict.fromkeys(again))}.")
    if any(field.startswith("init_image.") for field in drawn):
        sentences.append("Paint the area that changes again.")
    if any(field.startswith("people.") for field in drawn):
        sentences.append("Draw the regions again.")
    return " ".join(sentences)


def _is_painted(field: str, name: str) -> bool:
    """Whether a file is a mask that has been painted on a page."""
    if field == "init_image.mask":
        return name == PAINTED_FILE.format(1)
    return field.endswith(".mask") and is_drawn(name)
