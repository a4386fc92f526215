"""Image tokens in the cross-attentions of a U-Net that another program runs, see `methods.host`.

Shapes: B rows of the batch, L image positions, T image tokens, h heads, D width of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import linear

from openpulid.errors import WeightsError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import TensorGroups, explain_bad_weights
from openpulid.methods.host import Grid, HostIdentity, select_rows
from openpulid.methods.ip_adapter.base import IPAdapterBase
from openpulid.methods.ip_adapter.processors import build_layers
from openpulid.methods.second_attention import attend

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class IPAdapterHostIdentity(HostIdentity):
    """An identity prepared for the cross-attentions of an SDXL U-Net.

    Attributes:
        keys_values: layer key -> keys and values (2, T, D): of the identity, then of the negative
            prompt.
    """

    keys_values: Mapping[str, KeyValue] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def prepare(
        cls,
        method: IPAdapterBase,
        identity: Identity,
        scale: float = 1.0,
        masks: Tensor | None = None,
    ) -> IPAdapterHostIdentity:
        """Compute the keys and values of all layers, on the CPU and in float32.

        Args:
            method: the adapter.
            identity: the person.
            scale: weight of the image tokens.
            masks: (M, H, W) in [0, 1], one for all images of the batch or one per image; None for
                everywhere.

        Raises:
            OptionError: A value is out of range, or the identity lacks what the adapter reads.
            WeightsError: The adapter's file is damaged.
        """
        tokens = compute_tokens(method, identity)
        keys_values = {}
        for key in layer_keys(method):
            keys, values = (
                linear(tokens, method.parts["ip_adapter"][f"{key}.to_{kind}_ip.weight"].float())
                for kind in "kv"
            )
            keys_values[key] = (keys, values)
        return cls(scale, masks, keys_values=keys_values)

    def contribution(
        self,
        key: str,
        query: Tensor,
        text: Tensor,
        num_heads: int,
        is_negative: Sequence[bool],
        grid: Grid,
        num_images: int = 1,
    ) -> Tensor:
        """Compute what the image tokens add to the output of the text's attention.

        Args:
            key: of the layer.
            query: (B, L, D).
            text: output of the text's attention before the output projection, (B, L, D).
            num_heads: h.
            is_negative: per row whether it is of the negative prompt.
            grid: rows and columns of the positions; read with a mask only.
            num_images: of the batch; the rows repeat them once per prompt.

        Returns:
            (B, L, D), multiplied by the scale.

        Raises:
            OptionError: There is a mask that does not fit the positions or the images.
        """

        def place() -> KeyValue:
            keys, values = (x.to(query.device, query.dtype) for x in self.keys_values[key])
            return keys, values

        pair = self.placed.get((key, query.device, query.dtype), place)
        keys, values = (select_rows(x, is_negative) for x in pair)
        added = attend(query, keys, values, num_heads)
        region = self.region(grid, query, num_images)
        if region is not None:
            added = added * region.to(added)
        return self.scale * added.to(text.dtype)


@torch.no_grad()
def compute_tokens(method: IPAdapterBase, identity: Identity) -> Tensor:
    """Compute the image tokens of an identity, and those of the negative prompt, on the CPU.

    Returns:
        (2, T, width of the text tokens), in float32.

    Raises:
        OptionError: The identity lacks what the adapter reads.
        IdentityError: Its features are not finite.
        WeightsError: The adapter's file is damaged.
    """
    identity.check_values()
    projection = build_projection(method.parts).float()
    return method.image_tokens(projection, identity)


def build_projection(parts: TensorGroups) -> nn.Module:
    """Build the projection of an IP-Adapter file with diffusers.

    `load_ip_adapter` builds it together with a U-Net's attention processors, so it gets a U-Net
    without any attention.

    Raises:
        WeightsError: The file is damaged.
    """
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
    )
    pipe = StableDiffusionXLPipeline(
        None, None, None, None, None, unet, None, add_watermarker=False
    )
    with explain_bad_weights("this adapter's file is damaged; download it again"):
        return build_layers(pipe, parts).projection


def layer_keys(method: IPAdapterBase) -> list[str]:
    """Return the published keys of the cross-attentions that an adapter changes."""
    return [
        name.removesuffix(".to_k_ip.weight")
        for name in method.parts["ip_adapter"]
        if name.endswith(".to_k_ip.weight")
    ]


def check_layers(method: IPAdapterBase, widths: Mapping[str, tuple[int, int]]) -> None:
    """Check that an adapter fits the cross-attentions of a U-Net.

    Args:
        method: the adapter.
        widths: layer key -> widths of the queries and of the text tokens.

    Raises:
        WeightsError: It was trained for another U-Net.
    """
    layers = method.parts["ip_adapter"]
    for kind in "kv":
        shapes = {
            key: tuple(layers[f"{key}.to_{kind}_ip.weight"].shape)
            for key in layer_keys(method)
            if f"{key}.to_{kind}_ip.weight" in layers
        }
        if shapes != dict(widths):
            raise WeightsError(
                "this adapter was trained for another base model; "
                "use it with that model, or an adapter for this one."
            )
