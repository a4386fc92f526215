"""The operators of the data flow that run networks, on a CPU or on a GPU; see `image_stages`."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from openpulid.data.captioner import Captioner
from openpulid.data.face_analysis import FaceAnalyzer
from openpulid.data.image_stages import CONTENT, PIXELS, PIXELS_SIZE, add_columns, report_count
from openpulid.data.models import load_face_models
from openpulid.data.options import PrepareOptions
from openpulid.data.records import from_table
from openpulid.data.work_folder import CAPTIONS, WorkFolder
from openpulid.device import select_device

if TYPE_CHECKING:
    import pyarrow


class FacesStage:
    """Detects, measures, filters and embeds the faces of decoded images.

    Args:
        options: see there.
    """

    def __init__(self, options: PrepareOptions) -> None:
        models = load_face_models(options, select_device())
        self.analyzer = FaceAnalyzer(models, options.filters)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Complete the records; the reduced images are dropped, and contents of no more use."""
        records = from_table(table)
        contents = []
        columns = (table[name].to_pylist() for name in (CONTENT, PIXELS, PIXELS_SIZE))
        for record, content, pixels, size in zip(records, *columns, strict=True):
            if record.is_kept:
                self.analyzer.analyze(record, _to_tensor(pixels, size))
            contents.append(content if record.is_kept else b"")
        return add_columns(records, {CONTENT: contents})


class CaptionStage:
    """Captions crops, and writes the batch.

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
            with Image.open(BytesIO(self.work.find_crop(record).read())) as image:
                images.append(image.convert("RGB"))
        for record, caption in zip(records, self.captioner.caption(images), strict=True):
            record.caption, record.captioner = caption, self.options.captioner
        self.work.write_batch(CAPTIONS, records)
        return report_count(len(records))


def _to_tensor(pixels: bytes, size: list[int]) -> torch.Tensor:
    width, height = size
    values = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    return torch.from_numpy(values.copy()).permute(2, 0, 1).float() / 255
