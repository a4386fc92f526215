"""The index of a dataset: a parquet file with every image of the sources and the decision on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openpulid.data.options import PrepareOptions
from openpulid.data.records import EMBEDDING, ImageRecord, from_table, to_table
from openpulid.errors import TrainingError
from openpulid.io.files import replace_file

INDEX_FILE = "index.parquet"
METADATA_KEY = b"openpulid"
PRIVATE_COLUMNS = (EMBEDDING, "version")
"""Columns that are not in the index: face embeddings are biometric data."""


@dataclass(frozen=True)
class DatasetInfo:
    """How a dataset was prepared.

    Attributes:
        options: see there.
        sources: hash of the sources.
        face_models: name -> hash of the face models.
        version: of openpulid.
    """

    options: PrepareOptions
    sources: str
    face_models: Mapping[str, str]
    version: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {**self.__dict__, "options": self.options.to_json()}


def write_index(dataset: Path, records: Sequence[ImageRecord], info: DatasetInfo) -> None:
    """Write the index, which makes a dataset complete.

    Raises:
        OutputError: the disk is full.
    """
    import pyarrow.parquet

    # the crops of dropped images are deleted
    placed = [
        record if record.is_kept else replace(record, file="", offset=-1, size=-1)
        for record in records
    ]
    table = to_table(sorted(placed, key=lambda record: record.name))
    table = table.drop_columns(list(PRIVATE_COLUMNS))
    metadata = {METADATA_KEY: json.dumps(info.to_json())}
    with replace_file(dataset / INDEX_FILE) as temporary:
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), temporary)


def is_dataset(folder: Path) -> bool:
    """Return whether a folder is a dataset of `pulid data prepare`."""
    return (folder / INDEX_FILE).is_file()


def read_info(dataset: Path) -> DatasetInfo:
    """Read how a dataset was prepared.

    Raises:
        TrainingError: the index is missing or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(dataset / INDEX_FILE).metadata
        data = json.loads(metadata[METADATA_KEY])
        return DatasetInfo(**{**data, "options": PrepareOptions.from_json(data["options"])})
    except FileNotFoundError:
        raise _no_dataset(dataset) from None
    except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError):
        raise _damaged(dataset) from None


def read_index(dataset: Path) -> list[ImageRecord]:
    """Read the records of all images, sorted by name.

    Raises:
        TrainingError: the index is missing or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return from_table(pyarrow.parquet.read_table(dataset / INDEX_FILE))
    except FileNotFoundError:
        raise _no_dataset(dataset) from None
    except (OSError, pyarrow.ArrowException, TypeError):
        raise _damaged(dataset) from None


def _no_dataset(dataset: Path) -> TrainingError:
    return TrainingError(
        f"{dataset} is no complete dataset; `pulid data prepare SOURCE -o {dataset}` completes it."
    )


def _damaged(dataset: Path) -> TrainingError:
    return TrainingError(
        f"{dataset / INDEX_FILE} is damaged; prepare the dataset again with --fresh."
    )
