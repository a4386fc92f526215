"""The images from which a dataset is prepared, and how their bytes and captions are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpulid.data.captioned_images import (
    ARCHIVE_SUFFIX,
    CAPTION_BYTES,
    CaptionedImages,
    find_archived_images,
    find_captioned_images,
)
from openpulid.errors import OptionError, TrainingError, escape_unprintable, first_line
from openpulid.io.tar_members import TarMember
from openpulid.io.text import decode_text

if TYPE_CHECKING:
    import pyarrow

TABLE_SUFFIX = ".parquet"
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "bytes", "image_path", "path", "file_name")
"""Columns of a parquet file in which images are looked for, in this order."""
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt", "description")
"""Columns of a parquet file in which captions are looked for, in this order."""
TEXT_TYPES = ("string", "large_string", "string_view", "null")
"""Types of a parquet column of captions."""
KEY_BYTES = 10
"""Length of the hash that names an image in a dataset; two of 10^9 collide once in 10^6 times."""


@dataclass(frozen=True)
class SourceImage:
    """Where an image and its caption are stored.

    Attributes:
        name: printable, unique among all sources, and the same wherever they are stored.
        path: the image, the archive or the parquet file.
        offset: of the image in an archive; or the row group of a parquet file; -1 for a file.
        size: of the image in an archive, in bytes; or the row in its row group.
        caption: the file, the archive or the column of the caption; empty without one.
        caption_offset: as `offset`.
        caption_size: as `size`.
        folder: the subfolder of the source that the image is in; empty for none.
        version: another number whenever the image or its caption has changed.
    """

    name: str
    path: str
    offset: int = -1
    size: int = -1
    caption: str = ""
    caption_offset: int = -1
    caption_size: int = -1
    folder: str = ""
    version: int = 0

    @property
    def key(self) -> str:
        """The name of the image in a dataset: a hash of its name in the sources."""
        return hashlib.blake2b(self.name.encode(), digest_size=KEY_BYTES).hexdigest()

    @property
    def is_row(self) -> bool:
        """Whether the image is a row of a parquet file."""
        return self.path.lower().endswith(TABLE_SUFFIX)

    def to_row(self) -> dict[str, Any]:
        """Return the attributes as values of a table, in which paths are bytes."""
        paths = {"path": os.fsencode(self.path), "caption": os.fsencode(self.caption)}
        return {**asdict(self), **paths}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> SourceImage:
        """Return an image from `to_row`."""
        paths = {name: os.fsdecode(row[name]) for name in ("path", "caption")}
        return cls(**{**row, **paths})

    def read_image(self) -> bytes | Path:
        """Return the content of the image, or its path if it is a file of its own.

        Raises:
            OSError: the archive or the parquet file cannot be read.
        """
        if self.is_row:
            return _read_image_cell(self)
        if self.offset >= 0:
            return TarMember(Path(self.path), self.offset, self.size).read()
        return Path(self.path)

    def read_caption(self) -> str:
        """Return the caption as one line; empty without one.

        Raises:
            OSError: it cannot be read.
        """
        if not self.caption:
            return ""
        if self.is_row:
            text = _read_cell(self, CAPTION_COLUMNS)
            if isinstance(text, list):  # several captions of one image
                text = next((item for item in text if item), None)
            return " ".join((text or "").split())
        if self.caption_offset >= 0:
            member = TarMember(Path(self.caption), self.caption_offset, self.caption_size)
            data = member.read(CAPTION_BYTES)
        else:
            with open(self.caption, "rb") as file:
                data = file.read(CAPTION_BYTES)
        return " ".join(decode_text(data).replace("\0", " ").split())


def find_sources(sources: Sequence[Path], dataset: Path | None = None) -> list[SourceImage]:
    """Find all images, sorted by name.

    Args:
        sources: folders, tar archives and parquet files. A folder is searched at any depth, also
            for archives and parquet files.
        dataset: folder of the dataset that is prepared; it is left out if it is in a source.

    Raises:
        OptionError: there is no such source, it holds no image, or it is the dataset.
        TrainingError: an archive is damaged, or a parquet file has captions that are no text.
    """
    images: list[SourceImage] = []
    labels: set[str] = set()
    for source in sources:
        if not source.exists():
            raise OptionError(
                f"{source} does not exist; name a folder of images, a tar archive or a parquet "
                "file."
            )
        if dataset is not None and source.resolve() == dataset.resolve():
            raise OptionError(f"{source} is a source: choose another folder with -o.")
        label = _find_label(source.resolve().name, labels)
        labels.add(label)
        found = list(_find_in(source, label, dataset))
        if not found:
            raise OptionError(f"{source} holds no image; name another source.")
        images += found
    return sorted(images, key=lambda image: image.name)


def _find_label(name: str, labels: Collection[str]) -> str:
    """Return the name of a source, with a number if another source has that name."""
    label, number = name, 1
    while label in labels:
        number += 1
        label = f"{name}-{number}"
    return label


def _find_in(source: Path, label: str, dataset: Path | None) -> Iterator[SourceImage]:
    if source.is_dir():
        images = find_captioned_images(source, dataset)
        yield from _list_images(images, label)
        for path in images.content.rest:
            if path.suffix.lower() == TABLE_SUFFIX:
                yield from _list_rows(source / path, f"{label}/{path}")
    elif source.suffix.lower() == TABLE_SUFFIX:
        yield from _list_rows(source, label)
    elif source.suffix.lower() == ARCHIVE_SUFFIX:
        for image in _list_images(find_archived_images(source), ""):
            # the archive is the first part of the name
            yield replace(image, name=f"{label}/{image.name.partition('/')[2]}")
    else:
        raise OptionError(
            f"{source} is no folder, tar archive (.tar) or parquet file (.parquet); unpack it, or "
            "name the folder that it is in."
        )


def _list_images(images: CaptionedImages, label: str) -> Iterator[SourceImage]:
    names = [*images.captions, *map(str, images.uncaptioned)]
    modified = cache(lambda path: path.stat().st_mtime_ns)  # an archive has many images
    for name in names:
        caption = images.captions.get(name, "")
        member = images.members.get(name)
        text = images.members.get(caption)
        path = images.folder / name if member is None else member.archive
        location = _locate(images.folder, caption, text)
        yield SourceImage(
            name=escape_unprintable(f"{label}/{name}" if label else name),
            path=str(path),
            offset=-1 if member is None else member.offset,
            size=-1 if member is None else member.size,
            caption=location,
            caption_offset=-1 if text is None else text.offset,
            caption_size=-1 if text is None else text.size,
            folder=escape_unprintable(images.find_person(name) or ""),
            version=_combine(modified(path), caption, caption and modified(Path(location))),
        )


def _locate(folder: Path, name: str, member: TarMember | None) -> str:
    if not name:
        return ""
    return str(folder / name if member is None else member.archive)


def _combine(*facts: object) -> int:
    """Return a number of 63 bits that changes when a fact does."""
    digest = hashlib.blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _list_rows(path: Path, label: str) -> Iterator[SourceImage]:
    import pyarrow

    modified = path.stat().st_mtime_ns
    try:
        table = _open_table(str(path), modified)
    except (OSError, pyarrow.ArrowException) as error:
        reason = first_line(error)
        raise TrainingError(f"{path} cannot be read as a parquet file ({reason}).") from None
    names = table.schema_arrow.names
    if _find_column(names, IMAGE_COLUMNS) is None:
        raise TrainingError(
            f"{path} has no column of images: name it {IMAGE_COLUMNS[0]!r}, with the content or "
            "the path of each image."
        )
    caption = _find_column(names, CAPTION_COLUMNS) or ""
    if caption:
        _check_captions(path, table.schema_arrow.field(caption))
    index = 0
    for group in range(table.metadata.num_row_groups):
        for row, has_caption in enumerate(_find_captions(table, group, caption)):
            name = escape_unprintable(f"{label}/{index:09d}")
            column = caption if has_caption else ""
            yield SourceImage(name, str(path), group, row, column, version=modified)
            index += 1


def _find_captions(table: pyarrow.parquet.ParquetFile, group: int, column: str) -> Sequence[bool]:
    """Return whether each row of a group has a caption; without a column none has."""
    metadata = table.metadata.row_group(group)
    if not column:
        return [False] * metadata.num_rows
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    statistics = [chunk.statistics for chunk in chunks if chunk.path_in_schema == column]
    if statistics and statistics[0] is not None and statistics[0].null_count == 0:
        return [True] * metadata.num_rows  # known without reading them
    is_valid: list[bool] = table.read_row_group(group, [column])[column].is_valid().to_pylist()
    return is_valid


def _check_captions(path: Path, column: pyarrow.Field) -> None:
    """Raise TrainingError if a column is neither text nor lists of texts."""
    import pyarrow

    kind = column.type
    if isinstance(kind, (pyarrow.ListType, pyarrow.LargeListType, pyarrow.FixedSizeListType)):
        kind = kind.value_type
    if isinstance(kind, pyarrow.DictionaryType):
        kind = kind.value_type
    if str(kind) not in TEXT_TYPES:
        raise TrainingError(
            f"{path}: the column {column.name!r} of captions holds {column.type}: convert it to "
            "text, or rename it."
        )


def _find_column(names: Sequence[str], wanted: Iterable[str]) -> str | None:
    by_name = {name.lower(): name for name in reversed(names)}
    return next((by_name[name] for name in wanted if name in by_name), None)


@lru_cache(maxsize=4)
def _open_table(path: str, modified: int) -> pyarrow.parquet.ParquetFile:
    """Open a parquet file; it is opened again when it has changed."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


@lru_cache(maxsize=2)  # images are read in order, and a row group is read as a whole
def _read_row_group(path: str, modified: int, group: int) -> dict[str, Any]:
    table = _open_table(path, modified)
    names = table.schema_arrow.names
    columns = [_find_column(names, wanted) for wanted in (IMAGE_COLUMNS, CAPTION_COLUMNS)]
    rows = table.read_row_group(group, [name for name in columns if name])
    return {name: rows[name].to_pylist() for name in rows.column_names}


def _read_cell(image: SourceImage, wanted: Sequence[str]) -> Any:
    """Return the value in a column of a parquet file; None without the column."""
    row_group = _read_row_group(image.path, image.version, image.offset)
    column = _find_column(list(row_group), wanted)
    return None if column is None else row_group[column][image.size]


def _read_image_cell(image: SourceImage) -> bytes | Path:
    """Return the content of an image in a parquet file, or the path that the file gives."""
    cell = _read_cell(image, IMAGE_COLUMNS)
    if isinstance(cell, dict):  # an image column of Hugging Face's datasets
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        return Path(image.path).parent / cell
    return cell or b""
