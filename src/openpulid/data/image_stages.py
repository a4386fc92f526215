"""The operators of the data flow that need no networks, and the columns that they pass on.

    decode -> faces (`model_stages`) -> store    one batch of source images
    caption (`model_stages`)                     one batch of crops
    write                                        one shard

Ray Data calls each with a table of a batch. Each is a class that is created once per worker. This
module does not import torch, which takes seconds and 300 MB in each worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import imagehash
from PIL import Image

from openpulid.data.cropping import crop_image
from openpulid.data.options import PrepareOptions
from openpulid.data.records import ImageRecord, from_table, to_table
from openpulid.data.shards import Shard, write_shard
from openpulid.data.sources import SourceImage
from openpulid.data.work_folder import FACES, WorkFolder
from openpulid.errors import ImageError
from openpulid.io.images import MAX_BYTES, open_image

if TYPE_CHECKING:
    import pyarrow

CONTENT = "content"
PIXELS = "pixels"
PIXELS_SIZE = "pixels_size"
"""Columns next to those of the records: the image file, and the reduced image."""
CHILD_SECONDS = 60
"""Time limit of a child process that decodes one image."""

SHARD = "shard"
"""Column of the name of the shard."""
COUNT = "count"
"""Column of the number of images that an operator has finished."""


class DecodeStage:
    """Reads and decodes images: size, perceptual hash, and a reduced image for the face models.

    A batch that has killed a worker before is decoded in child processes: decoders of damaged files
    can crash.

    Args:
        options: see there.
        work: counts the attempts.
        longest: longer side of the reduced image in pixels.
    """

    def __init__(self, options: PrepareOptions, work: WorkFolder, longest: int) -> None:
        self.options = options
        self.work = work
        self.longest = longest

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Map rows of `SourceImage` to records with the columns of the image."""
        sources = [SourceImage(**row) for row in table.to_pylist()]
        records = [
            ImageRecord(source.name, source.key, source.folder, source.modified)
            for source in sources
        ]
        time_limit = None if self.work.count_attempt(records) == 1 else CHILD_SECONDS
        contents, pixels, sizes = [], [], []
        for source, record in zip(sources, records, strict=True):
            content, image = self._decode(source, record, time_limit)
            contents.append(content)
            pixels.append(image.tobytes())
            sizes.append(list(image.size))
        return add_columns(records, {CONTENT: contents, PIXELS: pixels, PIXELS_SIZE: sizes})

    def _decode(
        self, source: SourceImage, record: ImageRecord, time_limit: float | None
    ) -> tuple[bytes, Image.Image]:
        """Return the content of an image, and the reduced image; both are empty after an error."""
        try:
            content = source.read_image()
            if isinstance(content, Path):
                with open(content, "rb") as file:
                    content = file.read(MAX_BYTES + 1)
            image = open_image(content, name=source.name, time_limit=time_limit)
            if not self.options.replace_captions:
                record.caption = source.read_caption()
        except (ImageError, OSError) as error:
            record.decision = "unreadable"
            record.error = getattr(error, "reason", None) or str(error)
            return b"", Image.new("RGB", (0, 0))
        record.width, record.height = image.size
        if max(image.size) > self.options.filters.max_aspect * min(image.size):
            record.decision = "aspect"
            return b"", Image.new("RGB", (0, 0))
        record.phash = int(str(imagehash.phash(image)), 16)
        image.thumbnail((self.longest, self.longest), Image.Resampling.LANCZOS)
        return content, image


class StoreStage:
    """Crops and encodes the images that have passed the filters, and writes the batch.

    Args:
        options: see there.
        work: where batches are written.
    """

    def __init__(self, options: PrepareOptions, work: WorkFolder) -> None:
        self.options = options
        self.work = work

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Write a batch; return the number of its images."""
        records = from_table(table)
        crops = [
            crop_image(open_image(content), record, self.options) if record.is_kept else None
            for record, content in zip(records, table[CONTENT].to_pylist(), strict=True)
        ]
        self.work.write_batch(FACES, records, crops)
        return report_count(len(records))


class WriteStage:
    """Writes shards.

    Args:
        folder: of the dataset.
        work: where the crops are.
    """

    def __init__(self, folder: Path, work: WorkFolder) -> None:
        self.folder = folder
        self.work = work

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Write one shard, whose images are the rows; return where they are in it."""
        name = table[SHARD][0].as_py()
        records = write_shard(self.folder, Shard(name, from_table(table)), self.work)
        return to_table(records)


def to_shard_table(shard: Shard) -> pyarrow.Table:
    """Return the table that `WriteStage` reads."""
    return to_table(shard.records).append_column(SHARD, [[shard.name] * len(shard.records)])


def add_columns(records: list[ImageRecord], columns: dict[str, Any]) -> pyarrow.Table:
    """Return a table of records with columns of their images."""
    import pyarrow

    table = to_table(records)
    for name, values in columns.items():
        kind = pyarrow.list_(pyarrow.int32()) if name == PIXELS_SIZE else pyarrow.large_binary()
        table = table.append_column(name, pyarrow.array(values, kind))
    return table


def report_count(number: int) -> pyarrow.Table:
    """Return a table that says how many images are finished."""
    import pyarrow

    return pyarrow.table({COUNT: [number]})
