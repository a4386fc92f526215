"""Crop an image around its face, and encode the crop."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from openpulid.data.options import PrepareOptions
from openpulid.data.records import ImageRecord

MAX_ASPECT = 2.0
"""Longer over shorter side of a crop, as of the widest and the highest bucket in training."""


def crop_image(image: Image.Image, record: ImageRecord, options: PrepareOptions) -> bytes | None:
    """Crop an image around its face, and encode the crop as JPEG.

    The crop has the aspect ratio of the image, as far as training has such crops. Its shorter side
    is limited to `context` sizes of the face, and then to `size` pixels. It is never enlarged.

    Args:
        image: the complete image.
        record: box and landmarks are those in the image, and become those in the crop.
        options: see there.

    Returns:
        The content of the file; None if the crop is too small, which is recorded.
    """
    box = np.array(record.box)
    size = np.array(image.size)
    extent = _choose_extent(size, float((box[2:] - box[:2]).max()), options.context)
    if extent.min() < options.filters.min_side:
        record.decision = "small_crop"
        return None
    corner = np.clip((box[:2] + box[2:] - extent) / 2, 0, size - extent).round().astype(int)
    scale = min(1.0, options.size / extent.min())
    width, height = (max(round(side * scale), 1) for side in extent.tolist())
    crop = image.crop((*corner, *(corner + extent)))
    if scale < 1:
        crop = crop.resize((width, height), Image.Resampling.LANCZOS)
    record.crop_width, record.crop_height = width, height
    record.box = ((box.reshape(2, 2) - corner) * scale).flatten().round(2).tolist()
    landmarks = np.array(record.landmarks).reshape(5, 2)
    record.landmarks = ((landmarks - corner) * scale).flatten().round(2).tolist()
    content = BytesIO()
    crop.save(content, "JPEG", quality=options.quality, subsampling=0)
    return content.getvalue()


def _choose_extent(size: np.ndarray, face: float, context: float) -> np.ndarray:
    """Return width and height of a crop in pixels of the image.

    Args:
        size: width and height of the image.
        face: longer side of the face.
        context: see `PrepareOptions`.
    """
    longer = min(size.max(), MAX_ASPECT * size.min())
    extent = np.where(size == size.max(), longer, size.min())
    reduction = min(1.0, context * face / size.min())
    return np.maximum((extent * reduction).round().astype(int), 1)
