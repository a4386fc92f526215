"""The style of another image, through an IP-Adapter next to PuLID."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from openpulid.errors import WeightsError
from openpulid.io.images import open_image
from openpulid.methods.ip_adapter.ip_adapter import IPAdapter
from openpulid.pipelines.model_set import DEFAULT_STYLES, ModelSet
from openpulid.pipelines.request_inputs import PUBLISHED_STYLES, StyleImage
from openpulid.pipelines.style_encoder import encode_style
from openpulid.pipelines.style_flux import VISION_ENCODER as FLUX_ENCODER
from openpulid.pipelines.style_flux import FluxStyleInput
from openpulid.pipelines.weights import missing_sources, resolve_path

VISION_ENCODER = "clip-h"
"""The published vision encoder of IP-Adapter's files for SDXL that end with `vit-h`."""


class StyleAdapterFile:
    """The file of an IP-Adapter for SDXL, which is loaded when it is first used.

    Args:
        path: the file.

    Raises:
        WeightsError: it is of another kind.
    """

    def __init__(self, path: Path) -> None:
        IPAdapter.check_file(path)
        self.path = path

    @cached_property
    def adapter(self) -> IPAdapter:
        """The IP-Adapter; it is loaded now if it has not been used yet."""
        adapter = IPAdapter.load(self.path)
        assert isinstance(adapter, IPAdapter)
        return adapter


@dataclass(frozen=True, eq=False)
class StyleInput:
    """The files of a `StyleImage`.

    Attributes:
        image: the decoded image.
        scale: weight of its tokens.
        file: of the IP-Adapter; several style images can share it.
        vision_encoder: file of the vision encoder, or the miniature's folder of it.
    """

    image: Image.Image
    scale: float
    file: StyleAdapterFile
    vision_encoder: Path

    @contextmanager
    def use(self, pipe: Any) -> Iterator[dict[str, Tensor]]:
        """Let a pipeline of SDXL follow the style while this is open.

        Yields:
            Arguments of the pipeline: none.

        Raises:
            WeightsError: the IP-Adapter is damaged, or for another base model or vision encoder.
        """
        if not self.scale:
            yield {}
            return
        # IP-Adapter takes the features of any image like those of a person
        features = encode_style(
            self.vision_encoder, self.image, pipe._execution_device, pipe.unet.dtype
        )
        adapter = self.file.adapter
        adapter.attach(pipe)
        try:
            with adapter.use(features, scale=self.scale, pipe=pipe):
                yield {}
        finally:
            adapter.detach(pipe)


def open_style(
    style: StyleImage, models: ModelSet, time_limit: float | None = None
) -> StyleInput | FluxStyleInput:
    """Open the image and find the IP-Adapter; its weights are not read.

    Args:
        style: of the request.
        models: the models that run the request.
        time_limit: seconds for the image, as for `open_image`.

    Raises:
        ImageError: the file is not an image.
        WeightsError: weights are missing, or of another kind.
    """
    image = open_image(style.image, min_side=1, time_limit=time_limit)
    if (own := models.style_files) is not None:
        adapter_file = own.adapter if style.model is None else resolve_path(style.model)
        return StyleInput(image, style.scale, StyleAdapterFile(adapter_file), own.vision_encoder)
    name = style.model or DEFAULT_STYLES[models.family]
    is_flux = PUBLISHED_STYLES.get(name) == "flux"
    encoder = FLUX_ENCODER if is_flux else VISION_ENCODER
    if missing := missing_sources([name, encoder]):
        raise WeightsError(
            f"a style image needs weights that are not installed: {', '.join(missing)}; "
            f"`pulid weights get {' '.join(missing)}` downloads them."
        )
    adapter_file = resolve_path(name)
    if is_flux:
        return FluxStyleInput(image, style.scale, adapter_file, resolve_path(encoder))
    return StyleInput(image, style.scale, StyleAdapterFile(adapter_file), resolve_path(encoder))
