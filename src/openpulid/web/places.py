"""Where on the page an error is shown: next to the components that it is about."""

from __future__ import annotations

from openpulid.errors import FaceError, IdentityError, PromptError, PulidError, escape_unprintable
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import RequestError
from openpulid.web.add_ons import CONTROL_PREFIXES, used_controls
from openpulid.web.fields import FIELDS
from openpulid.web.form import FormValues
from openpulid.web.regions import PERSON_PREFIXES

FIELD_PLACES = {entry.path: entry.section for entry in FIELDS}
"""Path of a field of the request -> place; the sections of the form are places."""

PART_PLACES = {
    "width": "main",
    "height": "main",
    "init_image": "edit",
    "style_image": "style",
    "loras": "loras",
    "embeddings": "loras",
    "model": "models",
}
"""First part of the path of all other fields -> place."""


def person_place(prefix: str) -> str:
    """Return the place of a person, by the prefix of the components."""
    return prefix.rstrip("_") or "person"


def control_place(prefix: str) -> str:
    """Return the place of a ControlNet, by the prefix of its components."""
    return f"{prefix}control"


PLACES = (
    *map(person_place, ("", *PERSON_PREFIXES)),
    *dict.fromkeys(FIELD_PLACES.values()),
    *map(control_place, CONTROL_PREFIXES),
    *("drawing", "models", "style", "loras", "restore"),
)
"""All places."""


def find_place(
    error: PulidError, form: FormValues, request: GenerationRequest | None = None
) -> str | None:
    """Find the place of an error.

    Args:
        error: names fields of the request, or one of its files.
        form: describes the request.
        request: the request; None if the form describes none.
    """
    if isinstance(error, PromptError):
        return "prompt"
    fields = list(error.fields) if isinstance(error, RequestError) else []
    if not fields and request is not None:
        fields = [
            field
            for field, name in request.input_files()
            if not field.startswith("model.") and escape_unprintable(name) in str(error)
        ]
    for field in fields:
        if (place := _find_field(field, form)) is not None:
            return place
    if isinstance(error, (FaceError, IdentityError)) and len(form.people) == 1:
        return person_place(form.people[0])
    return None


def _find_field(field: str, form: FormValues) -> str | None:
    """Return the place of a field of the request."""
    first, _, path = field.partition(".")
    number = path.partition(".")[0]
    position = int(number) if number.isdecimal() else 0
    if first == "people":
        return person_place(dict(enumerate(form.people)).get(position, ""))
    if first == "controls":
        prefixes = used_controls(form.values)
        return control_place(dict(enumerate(prefixes)).get(position, ""))
    return FIELD_PLACES.get(field) or PART_PLACES.get(first)
