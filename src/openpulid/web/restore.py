"""The values of the form that generate an image again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import FaceRefinement, GenerationRequest
from openpulid.pipelines.request_inputs import DEFAULT_FACE_ORDER, Person
from openpulid.web.add_ons import find_unknown, read_add_ons
from openpulid.web.fields import FIELDS
from openpulid.web.form import (
    DRAWN,
    MAX_PEOPLE,
    PERSON_PREFIXES,
    REGIONS,
    SIDE_BY_SIDE,
    side_by_side,
)
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
    _check_inputs(request)
    values: dict[str, Any] = {
        entry.name: entry.read(request) for entry in FIELDS if entry.is_supported(preset)
    }
    values = {name: value for name, value in values.items() if value is not None}
    values["seed"] = str(request.seed)  # browsers round integers above 2^53
    values["mode"] = find_mode(request)
    if request.width and request.height:
        values["size"] = f"{request.width}x{request.height}"
    values |= read_add_ons(request)
    if values["mode"] == "people":
        values |= _read_people(request)
    elif request.people:
        (person,) = request.people
        values["face_index"] = person.face_index or 0
        if person.scale is not None:
            values["scale"] = person.scale
    return values


def _check_inputs(request: GenerationRequest) -> None:
    """Refuse a request with inputs that have no component."""
    unknown = find_unknown(request)
    if any(person.face_order != DEFAULT_FACE_ORDER for person in request.people):
        unknown.append("faces counted in another order")
    if request.refine_faces not in (None, FaceRefinement()):
        unknown.append("a second pass on faces with its own strength or size")
    _refuse(unknown)


def _refuse(unknown: Sequence[str]) -> None:
    """Raise OptionError if an image has something that the page does not have."""
    if unknown:
        raise OptionError(
            f"the image was generated with {' and '.join(unknown)}, which this page does not have; "
            "use `pulid generate --from` for it."
        )


def find_mode(request: GenerationRequest) -> str:
    """Return the tab that can describe a request.

    Raises:
        OptionError: there is none.
    """
    has_regions = any(person.has_region for person in request.people)
    is_group = has_regions or len(request.people) > 1
    if is_group and request.init_image is not None:
        raise OptionError(
            "the image was edited with several people; use `pulid generate --from` for it."
        )
    if len(request.people) > MAX_PEOPLE:
        raise OptionError(f"the image shows more than the {MAX_PEOPLE} people of this page.")
    if is_group:
        return "people"
    return "create" if request.init_image is None else "edit"


def _read_people(request: GenerationRequest) -> dict[str, Any]:
    values: dict[str, Any] = {}
    count = len(request.people)
    for position, person in enumerate(request.people):
        prefix = PERSON_PREFIXES[position]
        values[prefix + "region"] = _find_region(person, position, count)
        values[prefix + "scale"] = person.scale or 0
        values[prefix + "face_index"] = person.face_index or 0
    return values


def _find_region(person: Person, position: int, count: int) -> str:
    if person.mask is not None:
        return DRAWN
    if person.box == side_by_side(position, count):
        return SIDE_BY_SIDE
    for name, box in REGIONS.items():
        if person.box == box:
            return name
    raise OptionError("the image has a region that this page cannot show; draw it again.")


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
    files = {
        name: file
        for name, file in provenance.required_files().items()
        if not name.endswith(".mask")
    }
    sentences = []
    if files:
        sentences.append(f"Add the same files again: {', '.join(dict.fromkeys(files.values()))}.")
    if len(files) < len(provenance.required_files()):
        sentences.append("Draw the mask again.")
    return " ".join(sentences)
