"""PuLID in the cross-attentions of an SDXL U-Net that another program runs, see `methods.host`.

Shapes: B rows of the batch, L image positions, N identity tokens, h heads of width d, D = h * d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openpulid.identity.identity import Identity
from openpulid.methods.host import Grid, HostIdentity, pair_on_cpu, select_rows
from openpulid.methods.pulid.masks import convert_masks
from openpulid.methods.pulid.projection import zero_token_bias
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.methods.pulid.sdxl_attention import (
    AttentionOptions,
    KeyValue,
    split_heads,
)
from openpulid.methods.pulid.sdxl_layer import sum_contributions


@dataclass(frozen=True, eq=False)
class SDXLHostIdentity(HostIdentity):
    """An identity prepared for the cross-attentions of an SDXL U-Net.

    Attributes:
        keys_values: layer key -> keys and values (2, N, D): of the identity, then of no identity.
        options: how the identity acts; its `span` is left to the program.
    """

    keys_values: Mapping[str, KeyValue] = field(default_factory=dict)
    options: AttentionOptions = field(default_factory=AttentionOptions)

    @classmethod
    @torch.no_grad()
    def prepare(
        cls,
        adapter: PuLID,
        identity: Identity,
        options: AttentionOptions,
        masks: Tensor | None = None,
    ) -> SDXLHostIdentity:
        """Compute the keys and values of all layers.

        Args:
            adapter: on the device on which they are computed; they are returned on the CPU.
            identity: the person.
            options: how it acts.
            masks: (H, W), or one per image of the batch (M, H, W), in [0, 1]; None for everywhere.

        Raises:
            OptionError: A value is out of range.
            IdentityError: The identity has other sizes than the encoder reads.
        """
        positive = adapter.keys_values(adapter.encode_people([[(identity, None)]])[0])
        negative = adapter.keys_values(adapter.unconditional(identity.id_cond, identity.hidden))
        keys_values = {
            key: (
                pair_on_cpu(positive[key][0], negative[key][0]),
                pair_on_cpu(positive[key][1], negative[key][1]),
            )
            for key in positive
        }
        return cls(options.scale, convert_masks(masks), keys_values=keys_values, options=options)

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
        """Compute what the identity adds to the output of the text's attention.

        Args:
            key: of the layer.
            query: (B, L, D).
            text: output of the text's attention before the output projection, (B, L, D).
            num_heads: h.
            is_negative: per row whether it is of the negative prompt.
            grid: rows and columns of the positions; read with a mask only.
            num_images: of the batch, each in one row per prompt; read with several masks only.

        Returns:
            (B, L, D), multiplied by the scale.

        Raises:
            OptionError: There are masks, and the positions are not a grid of this size, or the
                number of masks is neither one nor that of the images.
        """
        num_zero = self.options.num_zero

        def place() -> KeyValue:
            keys, values = (
                split_heads(x[:, None].to(query.device, query.dtype), num_heads, num_zero)[0]
                for x in self.keys_values[key]
            )
            return keys, values

        pair = self.placed.get((key, query.device, query.dtype), place)
        keys, values = (select_rows(x, is_negative)[None] for x in pair)
        region = self.region(grid, query, num_images)
        total = sum_contributions(
            query,
            text,
            (keys, values),
            zero_token_bias(keys, num_zero),
            None if region is None else region[None],
            num_heads,
            self.options.projection,
        )
        return self.scale * total.to(text.dtype)
