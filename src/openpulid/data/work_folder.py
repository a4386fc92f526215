"""Results of the batches of a dataset that is being prepared.

Each batch is a parquet file of records, and a tar archive of the crops that it names. The archive
is written first: a batch exists when its parquet file does. An image can be in two batches if a
worker was killed between writing and reporting; it counts once.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openpulid.data.records import EMBEDDING, ImageRecord, from_table, record_schema, to_table
from openpulid.data.sources import SourceImage
from openpulid.errors import TrainingError
from openpulid.io.files import make_folder, replace_file
from openpulid.io.tar_members import TarMember, write_tar

if TYPE_CHECKING:
    import pyarrow

FACES = "faces"
CAPTIONS = "captions"
"""Subfolders: the results of the two kinds of batches."""
ATTEMPTS = "attempts"
"""Subfolder: how often the reading of a batch was begun."""

FOLDER_MODE = 0o700
"""Face embeddings are biometric data."""


@dataclass(frozen=True)
class WorkFolder:
    """The folder of intermediate results, which is deleted in the end.

    Attributes:
        path: the folder; every node of a cluster must see it under this path.
    """

    path: Path

    def create(self) -> None:
        """Create the folder, which only the user can read, and remove unfinished files.

        Raises:
            OutputError: it cannot be created.
        """
        shutil.rmtree(self.path / ATTEMPTS, ignore_errors=True)
        for name in (FACES, CAPTIONS, ATTEMPTS):
            make_folder(self.path / name)
            for file in (self.path / name).glob(".part-*"):
                file.unlink(missing_ok=True)
        self.path.chmod(FOLDER_MODE)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_batch(
        self, kind: str, records: list[ImageRecord], contents: Iterable[bytes | None] = ()
    ) -> None:
        """Write a batch.

        Args:
            kind: `FACES` or `CAPTIONS`.
            records: of the batch; where contents are, file, offset and size are set.
            contents: the crop of each record; None for a record without one.

        Raises:
            OutputError: the disk is full.
        """
        stem = _name_batch(records)
        crops = [
            (record, content)
            for record, content in zip(records, contents, strict=False)
            if content is not None
        ]
        if crops:
            with write_tar(self.path / kind / f"{stem}.tar", private=True) as tar:
                for record, content in crops:
                    record.offset = tar.add(f"{record.key}.jpg", content)
                    record.file, record.size = f"{kind}/{stem}.tar", len(content)
        import pyarrow.parquet

        with replace_file(self.path / kind / f"{stem}.parquet", private=True) as temporary:
            pyarrow.parquet.write_table(to_table(records), temporary)

    def count_attempt(self, records: Sequence[ImageRecord]) -> int:
        """Note that a batch is being read; return how often that has happened in this run.

        The second time, something in the batch has killed a worker.
        """
        with open(self.path / ATTEMPTS / _name_batch(records), "ab") as file:
            file.write(b".")
            return file.tell()

    def read_batches(
        self, kind: str, images: Iterable[SourceImage | ImageRecord]
    ) -> dict[str, ImageRecord]:
        """Read the records of images from all batches of a kind, by key; without embeddings.

        Args:
            kind: `FACES` or `CAPTIONS`.
            images: in the version that is wanted. Records of other versions do not count.

        Raises:
            TrainingError: a file is damaged.
        """
        names = [name for name in record_schema().names if name != EMBEDDING]
        versions = {image.key: image.version for image in images}
        records: dict[str, ImageRecord] = {}
        for table in self._read_tables(kind, names):
            for record in from_table(table):
                if versions.get(record.key) == record.version:
                    records[record.key] = record
        return records

    def read_embeddings(self, records: Sequence[ImageRecord]) -> np.ndarray:
        """Read the face embeddings of images, (N, D) float32.

        Args:
            records: at least one, each with an embedding.

        Raises:
            TrainingError: a file is damaged.
        """
        rows = {(record.key, record.version): row for row, record in enumerate(records)}
        embeddings = np.zeros((len(records), 0), np.float32)
        for table in self._read_tables(FACES, ["key", "version", EMBEDDING]):
            keys = zip(table["key"].to_pylist(), table["version"].to_pylist(), strict=True)
            for key, values in zip(keys, table[EMBEDDING], strict=True):
                if key in rows and len(values):
                    if not embeddings.shape[1]:
                        embeddings = np.zeros((len(records), len(values)), np.float32)
                    embeddings[rows[key]] = values.values.to_numpy()
        return embeddings

    def _read_tables(self, kind: str, columns: list[str]) -> Iterator[pyarrow.Table]:
        import pyarrow
        import pyarrow.parquet

        for file in sorted((self.path / kind).glob("*.parquet")):
            try:
                yield pyarrow.parquet.read_table(file, columns=columns)
            except (OSError, pyarrow.ArrowException):
                raise TrainingError(
                    f"{file} is damaged: delete it, and its images are read again."
                ) from None

    def read_crop(self, record: ImageRecord) -> bytes:
        """Read the crop of a record, a JPEG file.

        Raises:
            TrainingError: its archive is damaged.
        """
        archive = self.path / record.file
        try:
            return TarMember(archive, record.offset, record.size).read()
        except OSError as error:
            raise TrainingError(
                f"{archive} cannot be read ({error}): delete it and "
                f"{archive.with_suffix('.parquet').name}, and its images are read again."
            ) from error


def _name_batch(records: Sequence[ImageRecord]) -> str:
    keys = "\n".join(record.key for record in records)
    return hashlib.blake2b(keys.encode(), digest_size=10).hexdigest()
