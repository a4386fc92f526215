"""Batches of images: their faces and their captions. What exists already is not repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from openpulid.data.captioner import find_captioner
from openpulid.data.options import PrepareOptions
from openpulid.data.ray_flow import Operator, run_flow
from openpulid.data.records import ImageRecord, to_table
from openpulid.data.sources import SourceImage
from openpulid.data.stages import COUNT, CaptionStage, FacesStage
from openpulid.data.work_folder import CAPTIONS, FACES, WorkFolder

if TYPE_CHECKING:
    import pyarrow

LOG_SECONDS = 10

Item = TypeVar("Item")


@dataclass(frozen=True)
class BatchRunner:
    """Runs the stages that work on batches.

    Attributes:
        options: of the dataset.
        work: where results are stored.
        log: receives a line about the progress.
    """

    options: PrepareOptions
    work: WorkFolder
    log: Callable[[str], None]

    def analyze_faces(self, images: Sequence[SourceImage]) -> list[ImageRecord]:
        """Detect, measure, filter, embed and crop the faces of all images.

        Returns:
            The records in the order of the images.
        """
        import pyarrow

        records = self.work.read_batches(FACES, images)
        waiting = [image for image in images if image.key not in records]
        tables = [
            pyarrow.Table.from_pylist([image.to_row() for image in batch])
            for batch in self._split(waiting)
        ]
        operator = Operator(FacesStage, (self.options, self.work), has_models=True)
        self._run("faces", len(images), tables, operator)
        records = self.work.read_batches(FACES, images)
        return [records[image.key] for image in images]

    def caption(self, records: Sequence[ImageRecord]) -> None:
        """Caption the images that have no caption.

        Raises:
            WeightsError: the captioner is not installed.
        """
        wanted = [record for record in records if record.is_kept and not record.caption]
        captions = self.work.read_batches(CAPTIONS, wanted)
        # neighbors in an archive are read together
        waiting = sorted(
            (record for record in wanted if record.key not in captions),
            key=lambda record: (record.file, record.offset),
        )
        if waiting:  # a given caption can be empty
            find_captioner(self.options.captioner)
        tables = [to_table(list(batch)) for batch in self._split(waiting)]
        operator = Operator(CaptionStage, (self.options, self.work), has_models=True)
        self._run("captions", len(wanted), tables, operator)
        captions = self.work.read_batches(CAPTIONS, wanted)
        for record in wanted:
            record.caption = captions[record.key].caption
            record.captioner = captions[record.key].captioner

    def _split(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        size = self.options.batch
        for start in range(0, len(items), size):
            yield items[start : start + size]

    def _run(
        self,
        title: str,
        total: int,
        tables: Sequence[pyarrow.Table],
        operator: Operator,
    ) -> None:
        """Run an operator that reports how many images are done, and log the progress."""
        waiting = sum(len(table) for table in tables)
        started = logged = time.monotonic()
        done = 0
        for table in run_flow(tables, operator):
            done += sum(table[COUNT].to_pylist())
            now = time.monotonic()
            if now - logged >= LOG_SECONDS or done == waiting:
                logged = now
                rate = done / (now - started)
                finished = total - waiting + done
                self.log(f"{title}: {finished:,} of {total:,} images, {rate:.1f} per second")
