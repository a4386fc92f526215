"""Check the identities, LoRAs and embeddings of a request, whose libraries read files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from openpulid.errors import PulidError
from openpulid.identity.identity import Identity
from openpulid.io.temporary import private_directory
from openpulid.pipelines.add_ons import AddOns
from openpulid.pipelines.embeddings import open_embedding
from openpulid.pipelines.loras import open_lora
from openpulid.pipelines.request import GenerationRequest
from openpulid.service.api.files import Content
from openpulid.service.catalog import Offer

TENSOR_FIELDS = (".identity", ".model", ".file")
"""Last parts of the fields of safetensors files."""


def read_tensor_files(
    request: GenerationRequest, files: Mapping[str, Content], offer: Offer
) -> dict[str, Identity]:
    """Check identities, LoRAs and embeddings.

    Args:
        request: its files are paths of fields.
        files: path of a field -> its file.
        offer: the preset and method.

    Returns:
        Path of a field -> its identity.

    Raises:
        PulidError: a file is of another kind, damaged, or for other models.
    """
    fields = [field for field in files if field.endswith(TENSOR_FIELDS)]
    if not fields:
        return {}
    with private_directory() as folder:
        paths = {field: place_file(files[field], Path(folder, field)) for field in fields}
        with name_fields(paths):
            placed = request.with_files(paths)
            add_ons = AddOns(
                tuple(map(open_lora, placed.loras)),
                tuple(map(open_embedding, placed.embeddings)),
            )
            add_ons.check(offer.preset.models)
            return {
                field: Identity.load(path, offer.identity_models)
                for field, path in paths.items()
                if field.endswith(".identity")
            }


def place_file(content: Content, path: Path) -> Path:
    """Return a file with this content: a safetensors file of this name, or that of the content."""
    if isinstance(content, Path):
        return content
    path = path.with_name(f"{path.name}.safetensors")
    path.write_bytes(content)
    return path


@contextmanager
def name_fields(paths: Mapping[str, Path]) -> Iterator[None]:
    """Name fields of a request in errors, not the paths of their files.

    Args:
        paths: path of a field -> file.
    """
    try:
        yield
    except PulidError as error:
        message = str(error)
        for field, path in paths.items():
            message = message.replace(str(path), field)
        raise PulidError(message) from error.__cause__
