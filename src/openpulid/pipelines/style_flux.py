"""The style of another image on FLUX, through XLabs' IP-Adapter in diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from openpulid.errors import WeightsError
from openpulid.io.networks import describe_load_errors
from openpulid.pipelines.style_encoder import encode_style

VISION_ENCODER = "clip-l"
"""The published vision encoder of XLabs' IP-Adapter."""


@dataclass(frozen=True, eq=False)
class FluxStyleInput:
    """The files of a `StyleImage` for FLUX.

    Attributes:
        image: the decoded image.
        scale: weight of its tokens.
        adapter: file of the IP-Adapter.
        vision_encoder: file of the vision encoder.
    """

    image: Image.Image
    scale: float
    adapter: Path
    vision_encoder: Path

    @contextmanager
    def use(self, pipe: Any) -> Iterator[dict[str, Tensor]]:
        """Load the IP-Adapter into a pipeline while this is open.

        Yields:
            Arguments of the pipeline, each (1, 1, E) for one image.

        Raises:
            WeightsError: the IP-Adapter is for another base model or vision encoder.
        """
        if not self.scale:
            yield {}
            return
        black = Image.new("RGB", self.image.size)
        embeds = [self._encode(pipe, image) for image in (self.image, black)]
        processors = pipe.transformer.attn_processors
        try:
            with describe_load_errors(self.adapter):
                pipe.load_ip_adapter(
                    str(self.adapter.parent),
                    weight_name=self.adapter.name,
                    # the embeddings are computed here, with the encoder's own file
                    image_encoder_pretrained_model_name_or_path=None,
                    local_files_only=True,
                )
            self._check_width(pipe, embeds[0])
            pipe.set_ip_adapter_scale(self.scale)
            names = ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
            yield dict(zip(names, embeds, strict=True))
        finally:
            pipe.unload_ip_adapter()
            pipe.transformer.set_attn_processor(dict(processors))  # it empties a dictionary

    def _encode(self, pipe: Any, image: Image.Image) -> Tensor:
        dtype = pipe.transformer.dtype
        features = encode_style(self.vision_encoder, image, pipe._execution_device, dtype)
        return features.id_cond.to(dtype)

    def _check_width(self, pipe: Any, embeds: Tensor) -> None:
        projection = pipe.transformer.encoder_hid_proj.image_projection_layers[0]
        expected = projection.image_embeds.in_features
        if expected != embeds.shape[-1]:
            raise WeightsError(
                f"{self.adapter} was trained with a vision encoder of width {expected}, and that "
                f"of {self.vision_encoder} is {embeds.shape[-1]}; use {VISION_ENCODER}."
            )
