"""The images of a prepared dataset, read where they are: on a disk, or at a URL."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from openpulid.data.index import INDEX_FILE
from openpulid.data.records import KEPT
from openpulid.data.shards import HELD_OUT, TRAIN
from openpulid.errors import OptionError, TrainingError, first_line
from openpulid.io.images import open_image

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

COLUMNS = (
    "decision",
    "split",
    "file",
    "offset",
    "size",
    "key",
    "caption",
    "person",
    "box",
    "landmarks",
    "crop_width",
    "crop_height",
)
"""Columns of the index that training reads."""
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)
"""Waits before a server is asked again."""

logger = logging.getLogger(__name__)


class PreparedImages:
    """The images of one split; each is read by its offset in its shard.

    Any image can be read at any time, so that a run draws from all shards at random, and continues
    exactly where it was stopped. Images at a URL are requested together, see `prefetch`.

    Attributes:
        folder: folder or URL of the dataset.
        names: of the images, sorted.
        faces: (N, 16) box (4) and landmarks (10) of each face in pixels of its image, and the
            image's width and height.
    """

    def __init__(self, folder: str, file_system: AbstractFileSystem, root: str, split: str) -> None:
        self.folder = folder
        self.file_system = file_system
        self.root = root
        table = _read_columns(folder, file_system, root, split)
        columns = {name: table[name].to_pylist() for name in ("file", "key", "caption", "person")}
        self.names = [
            f"{file}/{person}/{key}.jpg"
            for file, person, key in zip(
                columns["file"], columns["person"], columns["key"], strict=True
            )
        ]
        self._rows = {name: row for row, name in enumerate(self.names)}
        self._files: list[str] = columns["file"]
        self._captions: list[str] = columns["caption"]
        self._people: list[str] = columns["person"]
        self._offsets, self._sizes = (table[name].to_numpy() for name in ("offset", "size"))
        numbers = [_stack(table[name], width) for name, width in (("box", 4), ("landmarks", 10))]
        numbers += [table[name].to_numpy()[:, None] for name in ("crop_width", "crop_height")]
        self.faces = np.concatenate(numbers, axis=1).astype(np.float32)
        self._contents: dict[str, bytes] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], split: str = TRAIN) -> PreparedImages:
        """Open a split.

        Args:
            folder: folder of the dataset, or a URL of one that fsspec supports, such as
                s3://BUCKET/DATASET.
            split: "train" or "held-out".

        Raises:
            OptionError: the URL is not supported; the message names the package that it needs.
            TrainingError: the index cannot be read.
        """
        return cls(os.fspath(folder), *_open_location(os.fspath(folder)), split)

    def prefetch(self, names: Sequence[str]) -> None:
        """Read images that are needed next, if the dataset is at a URL; they replace the last ones.

        Errors are raised when an image is opened.
        """
        if not is_url(self.folder):
            return
        rows = [self._rows[name] for name in names]
        contents = self.file_system.cat_ranges(
            [self._path(row) for row in rows],
            [int(self._offsets[row]) for row in rows],
            [int(self._offsets[row] + self._sizes[row]) for row in rows],
        )
        self._contents = {
            name: content
            for name, content in zip(names, contents, strict=True)
            if isinstance(content, bytes)
        }

    def open_image(self, name: str) -> Image.Image:
        """Open an image.

        Raises:
            ImageError: it cannot be used.
            OSError: the shard cannot be read, or is missing.
            TrainingError: the server of a URL does not answer for a minute.
        """
        content = self._contents.get(name) or self._read(self._rows[name])
        return open_image(content, name=f"{self.folder}/{name}")

    def read_caption(self, name: str) -> str:
        """Return the caption of an image."""
        return self._captions[self._rows[name]]

    def find_person(self, name: str) -> str:
        """Return who an image shows."""
        return self._people[self._rows[name]]

    def _path(self, row: int) -> str:
        return f"{self.root}/{self._files[row]}"

    def _read(self, row: int) -> bytes:
        start, size = int(self._offsets[row]), int(self._sizes[row])
        content = self._read_range(self._path(row), start, start + size)
        if len(content) != size:
            raise OSError(f"{self.folder}/{self._files[row]} is shorter than its index says")
        return content

    def _read_range(self, path: str, start: int, end: int) -> bytes:
        """Read bytes of a file; a server that fails is asked again for a minute."""
        waits = iter(RETRY_SECONDS)
        while True:
            try:
                content: bytes = self.file_system.cat_file(path, start, end)
                return content
            except FileNotFoundError:
                raise
            except Exception as error:  # the clients have unrelated exception classes
                if not is_url(self.folder):
                    raise
                wait = next(waits, None)
                if wait is None:
                    raise TrainingError(
                        f"{path} cannot be read ({first_line(error)}): check the connection and "
                        "the server, then run the same command to continue."
                    ) from None
                logger.warning("%s: %s; trying again", path, first_line(error))
                time.sleep(wait)


def is_url(location: str | os.PathLike[str]) -> bool:
    """Return whether a dataset is at a URL, not in a folder."""
    return "://" in os.fspath(location)


def is_prepared(location: str | os.PathLike[str]) -> bool:
    """Return whether a location is a dataset of `pulid data prepare`, as every URL should be."""
    return is_url(location) or (Path(location) / INDEX_FILE).is_file()


def has_held_out(location: str | os.PathLike[str]) -> bool:
    """Return whether a prepared dataset has images of people who are held out of training.

    Raises:
        OptionError: see `PreparedImages.open`, like the following.
        TrainingError: see there.
    """
    folder = os.fspath(location)
    return len(_read_columns(folder, *_open_location(folder), HELD_OUT)) > 0


def _open_location(location: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a dataset, and its path there."""
    from fsspec.core import url_to_fs

    try:
        file_system, root = url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise OptionError(f"{location} cannot be opened: {error}.") from None
    return file_system, root.rstrip("/")


def _read_columns(folder: str, file_system: AbstractFileSystem, root: str, split: str) -> Any:
    """Read the columns of a split from the index, sorted by shard."""
    import pyarrow
    import pyarrow.compute as pc
    import pyarrow.parquet

    try:
        with file_system.open(f"{root}/{INDEX_FILE}", "rb") as file:
            table = pyarrow.parquet.read_table(file, columns=list(COLUMNS))
    except FileNotFoundError:
        raise TrainingError(
            f"{folder} is no complete dataset: it has no {INDEX_FILE}; `pulid data prepare` writes "
            "it last."
        ) from None
    except (OSError, pyarrow.ArrowException) as error:
        reason = first_line(error)
        raise TrainingError(f"{folder}/{INDEX_FILE} cannot be read ({reason}).") from None
    is_used = pc.and_(pc.equal(table["decision"], KEPT), pc.equal(table["split"], split))
    return table.filter(is_used).sort_by([("file", "ascending"), ("offset", "ascending")])


def _stack(column: Any, width: int) -> np.ndarray:
    """Convert a column of lists to an array (N, width)."""
    values: np.ndarray = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, width)
