"""The uploads of a request: decoded in a child process, with the identities of its people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from openpulid import Identity
from openpulid.identity.reference import ReferenceFaces, open_references
from openpulid.io.metadata import save_image
from openpulid.pipelines.inputs import PersonInput, RequestInputs, open_inputs
from openpulid.pipelines.provenance import fingerprint_inputs
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.request_inputs import Person
from openpulid.web.masks import DECODE_SECONDS
from openpulid.web.session import WebSession

MAX_IDENTITIES = 16
"""Identities of the last reference images, which are kept in memory until the page is closed."""


def identify(session: WebSession, person: Person, models: ModelSelection) -> Identity:
    """Return the identity of a person, from its file or its images.

    Raises:
        FaceError: an image has no face that the preset knows.
    """
    request = GenerationRequest(prompt="identity", people=(person,))
    identity = open_request(session, request, models).people[0].identity
    assert isinstance(identity, Identity)
    return identity


def draw_faces(session: WebSession, person: Person, models: ModelSelection) -> Image.Image:
    """Draw the faces that are detected in the images of a person, and the extractor's crops."""
    references = open_references(person.images, time_limit=DECODE_SECONDS)
    faces = ReferenceFaces.detect(session.extractor(models), references)
    return faces.draw(person.face_index, person.face_order)


def open_request(
    session: WebSession, request: GenerationRequest, models: ModelSelection
) -> RequestInputs:
    """Open the inputs of a request, with the identities of its people."""
    preset = session.preset(models)
    inputs = open_inputs(request.without_people(), preset.models, time_limit=DECODE_SECONDS)
    people = tuple(_open_person(session, person, models) for person in request.people)
    return replace(inputs, people=people, fingerprints=fingerprint_inputs(request))


def _open_person(session: WebSession, person: Person, models: ModelSelection) -> PersonInput:
    """Open the files of a person. The same reference images are only analyzed once."""
    request = GenerationRequest(
        prompt="identity", people=(person.model_copy(update={"mask": None, "box": None}),)
    )
    hashes = tuple(fingerprint_inputs(request).values())
    preset = session.preset(models)
    key = (preset.selection, hashes, person.face_index, person.face_order)
    known = session.identities.get(key) if person.images else None
    alone = request.model_copy(update={"people": (person,)})
    inputs = open_inputs(alone, preset.models, known, DECODE_SECONDS)
    if inputs.has_reference_images:
        inputs = inputs.with_identities(alone, session.extractor(models))
        if len(session.identities) == MAX_IDENTITIES:
            session.identities.popitem(last=False)
        identity = inputs.people[0].identity
        assert isinstance(identity, Identity)
        session.identities[key] = identity
    return inputs.people[0]


def save_original(
    session: WebSession, inputs: RequestInputs, request: GenerationRequest, directory: Path
) -> str | None:
    """Save the initial image at the size of the generated ones, to compare with them."""
    if inputs.init_image is None or request.init_image is None:
        return None
    preset = session.preset(request.model or session.models)
    fitted = inputs.fit(request, preset.models)
    assert fitted.width is not None and fitted.height is not None
    resized = inputs.init_image.resize(fitted.width, fitted.height, request.init_image.resize)
    file = directory / "original.png"
    save_image(resized.image, file, source_type=None)  # of unknown origin
    return str(file)
