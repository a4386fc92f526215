"""The operators that Ray Data calls with a table of a batch; each stores what it computes.

    faces: decode, detect, measure, filter, embed, crop, encode
    captions

A worker runs all steps of a batch, so that a killed one loses no more than its batch. Each operator
is a class that is created once per worker, on a CPU or on a GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from PIL import Image

from openpulid.data.captioner import Captioner
from openpulid.data.cropping import crop_image
from openpulid.data.decode import CHILD_SECONDS, decode_image
from openpulid.data.face_analysis import FaceAnalyzer
from openpulid.data.models import load_face_models
from openpulid.data.options import PrepareOptions
from openpulid.data.records import ImageRecord, from_table
from openpulid.data.sources import SourceImage
from openpulid.data.work_folder import CAPTIONS, FACES, WorkFolder
from openpulid.device import select_device
from openpulid.errors import FaceError

if TYPE_CHECKING:
    import pyarrow

COUNT = "count"
"""Column of the number of images that an operator has finished."""

IMAGES_PER_THREAD = 4
"""Decoded images in memory: photos of 12 megapixels take 36 MB each."""


class FacesStage:
    """Decodes images, analyzes their faces, and stores records and crops.

    Images are decoded and encoded by as many threads as PyTorch has, which are the processors that
    Ray gives to the worker. A batch that has killed a worker before is decoded in child processes:
    decoders of damaged files can crash.

    Args:
        options: see there.
        work: where batches are written.
    """

    def __init__(self, options: PrepareOptions, work: WorkFolder) -> None:
        self.options = options
        self.work = work
        self.analyzer = FaceAnalyzer(load_face_models(options, select_device()), options.filters)
        self.num_threads = torch.get_num_threads()
        self.threads = ThreadPoolExecutor(self.num_threads)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Write a batch of rows of `SourceImage`; return the number of its images."""
        sources = [SourceImage.from_row(row) for row in table.to_pylist()]
        records = [
            ImageRecord(source.name, source.key, source.folder, source.version)
            for source in sources
        ]
        time_limit = None if self.work.count_attempt(records) == 1 else CHILD_SECONDS
        crops: list[bytes | None] = []
        size = IMAGES_PER_THREAD * self.num_threads
        for start in range(0, len(sources), size):
            part = slice(start, start + size)
            crops += self._process(sources[part], records[part], time_limit)
        self.work.write_batch(FACES, records, crops)
        return _report_count(len(records))

    def _process(
        self, sources: list[SourceImage], records: list[ImageRecord], time_limit: float | None
    ) -> list[bytes | None]:
        """Complete the records; return the crops of the images that have passed the filters."""
        decode = partial(decode_image, options=self.options, time_limit=time_limit)
        images = list(self.threads.map(decode, sources, records))
        for image, record in zip(images, records, strict=True):
            if image is None:
                continue
            try:
                self.analyzer.analyze(record, image)
            except FaceError:  # one face among millions must not end the run
                record.decision = "uncertain_face"
        return list(self.threads.map(self._crop, images, records))

    def _crop(self, image: Image.Image | None, record: ImageRecord) -> bytes | None:
        if image is None or not record.is_kept:
            return None
        return crop_image(image, record, self.options)


class CaptionStage:
    """Captions crops, and stores the captions.

    Args:
        options: see there.
        work: where crops are read and batches are written.
    """

    def __init__(self, options: PrepareOptions, work: WorkFolder) -> None:
        device = select_device()
        self.captioner = Captioner.load(options.captioner, device, options.caption_prompt)
        self.options = options
        self.work = work

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Write a batch of captions; return the number of its images."""
        records = from_table(table)
        images = []
        for record in records:
            with Image.open(BytesIO(self.work.read_crop(record))) as image:
                images.append(image.convert("RGB"))
        for record, caption in zip(records, self.captioner.caption(images), strict=True):
            record.caption, record.captioner = caption, self.options.captioner
        self.work.write_batch(CAPTIONS, records)
        return _report_count(len(records))


def _report_count(number: int) -> pyarrow.Table:
    import pyarrow

    return pyarrow.table({COUNT: [number]})
