"""Attention processors and image projection that diffusers builds from an IP-Adapter file.

`load_ip_adapter` puts both into the U-Net. Here they are built once, kept outside, and installed
only while an identity is in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from openpulid.errors import OptionError
from openpulid.io.checkpoints import TensorGroups


@dataclass(frozen=True)
class IPAdapterLayers:
    """Layers of a method for one U-Net.

    Attributes:
        processors: name -> attention processor, of all attention layers.
        projection: image embeddings -> image tokens.
    """

    processors: dict[str, Any]
    projection: nn.Module

    @property
    def cross_attention(self) -> dict[str, Any]:
        """The processors that have weights."""
        return {name: x for name, x in self.processors.items() if isinstance(x, nn.Module)}

    @property
    def image_projection(self) -> Any:
        """The projection layer of the single loaded file."""
        return self.projection.image_projection_layers[0]  # type: ignore[index]


def build_layers(pipe: Any, parts: TensorGroups) -> IPAdapterLayers:
    """Build the layers with diffusers; the pipeline is as it was afterwards.

    Raises:
        OptionError: The pipeline is offloaded, so its U-Net has no weights.
    """
    unet = pipe.unet
    if unet.device.type == "meta":
        raise OptionError(
            "this pipeline is already offloaded; "
            "attach the method before enable_sequential_cpu_offload()."
        )
    with restore_layers(pipe):
        # diffusers creates processors of the classes that it finds, without their arguments
        unet.encoder_hid_proj = None
        unet.set_attn_processor(AttnProcessor2_0())
        pipe.load_ip_adapter(parts, subfolder="", weight_name="", image_encoder_folder=None)
        projection = unet.encoder_hid_proj
        # a Resampler has attention of its own, which must not count among the U-Net's processors
        unet.encoder_hid_proj = None
        return IPAdapterLayers(dict(unet.attn_processors), projection)


@contextmanager
def restore_layers(pipe: Any) -> Iterator[dict[str, Any]]:
    """Restore what `load_ip_adapter` changes: processors, projection and feature extractor.

    Yields:
        The attention processors of the U-Net.
    """
    unet = pipe.unet
    projection = unet.encoder_hid_proj
    # a Resampler has attention of its own, which is not the U-Net's
    unet.encoder_hid_proj = None
    processors = dict(unet.attn_processors)
    unet.encoder_hid_proj = projection
    projection_type = unet.config.encoder_hid_dim_type
    extractor = getattr(pipe, "feature_extractor", None)
    try:
        yield processors
    finally:
        install_layers(unet, processors, projection, projection_type)
        if hasattr(pipe, "feature_extractor"):
            pipe.register_modules(feature_extractor=extractor)


def install_layers(
    unet: Any,
    processors: Mapping[str, Any],
    projection: nn.Module | None,
    projection_type: str | None,
) -> None:
    """Put processors and projection into a U-Net.

    The processors come first: a Resampler has attention of its own, which the U-Net would count
    among its layers.
    """
    unet.encoder_hid_proj = None
    unet.set_attn_processor(dict(processors))
    unet.encoder_hid_proj = projection
    unet.config.encoder_hid_dim_type = projection_type
