"""The identity of the person of a request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from openpulid.identity.identity import Identity
from openpulid.io.temporary import private_directory
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.service.api.files import Content
from openpulid.service.api.tensor_files import name_fields, place_file
from openpulid.service.queue.engine import Engine


def identify(engine: Engine, request: GenerationRequest, files: Mapping[str, Content]) -> Identity:
    """Extract the identity of a request's person, or read it from its file.

    Args:
        engine: has the face models.
        request: with one person; its files are paths of fields.
        files: path of a field -> its file.

    Raises:
        FaceError: an image has no face that the preset knows, or fewer faces.
        PulidError: a file cannot be used. The message names its field.
    """
    person = request.people[0]
    with private_directory() as folder:
        paths = {
            field: place_file(content, Path(folder, field)) for field, content in files.items()
        }
        with name_fields(paths):
            if person.identity is not None:
                return Identity.load(paths[person.identity])
            return engine.identify(
                request.model or ModelSelection(),
                [paths[field] for field in person.images],
                person.face_index,
                person.face_order,
            )
