"""PuLID in a network that another program runs, such as ComfyUI.

The program calls back in each cross-attention (SDXL) or after each block (FLUX), with its own
queries or image tokens, and adds what it gets. It says which rows of the batch are negative, so any
layout of the batch works.

Shapes: B rows of the batch, L image positions or tokens, N identity tokens, h heads of width d,
D = h * d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, layer_norm

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.hooks import check_scale, warn_if_other_ratio
from openpulid.methods.pulid.flux import PuLIDFlux, precompute_projections
from openpulid.methods.pulid.flux_attention import BlockKey, attend_projected
from openpulid.methods.pulid.masks import convert_mask
from openpulid.methods.pulid.projection import zero_token_bias
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.methods.pulid.sdxl_attention import (
    IdentityOptions,
    KeyValue,
    split_heads,
    sum_contributions,
)

Value = TypeVar("Value")

Grid = tuple[int, int]
"""Rows and columns of the image positions."""


@dataclass(eq=False)
class PlacedTensors:
    """Tensors on the device and in the dtype of the calls that use them.

    They are copied when a call first needs them, and stay there until `release`.
    """

    _placed: dict[object, Tensor | KeyValue | tuple[Tensor, ...]] = field(default_factory=dict)

    def get(self, key: object, create: Callable[[], Value]) -> Value:
        """Return the value of a key; create it when it is first needed."""
        if key not in self._placed:
            self._placed[key] = create()  # type: ignore[assignment]
        return self._placed[key]  # type: ignore[return-value]

    def release(self) -> None:
        """Free the copies."""
        self._placed.clear()


@dataclass(frozen=True, eq=False)
class HostIdentity:
    """What the identities of both families share: scale, mask and copies of their tensors.

    Attributes:
        scale: weight of the identity.
        mask: (H, W) in [0, 1]; None for everywhere.
        placed: copies on the device of the calls.
    """

    scale: float
    mask: Tensor | None = None
    placed: PlacedTensors = field(default_factory=PlacedTensors)

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def release(self) -> None:
        """Free the copies on the device of the calls; the next call creates them again."""
        self.placed.release()

    def region(self, grid: Grid, reference: Tensor) -> Tensor | None:
        """Resize the mask to the positions of a layer.

        Args:
            grid: rows and columns of the positions.
            reference: whose device is used.

        Returns:
            (1, L, 1) in float32, or None without a mask.

        Raises:
            OptionError: The positions are not a grid of this size.
        """
        if self.mask is None:
            return None
        if grid[0] * grid[1] != reference.shape[1]:
            raise OptionError(
                "masks need the network's own image positions, and a patch has changed their "
                "number (token merging, tiles); use the model without the patch, or no mask."
            )
        mask = self.mask

        def resize() -> Tensor:
            warn_if_other_ratio("mask", mask.shape, grid)
            resized = interpolate(mask[None, None], grid, mode="area")
            return resized.flatten(2).transpose(1, 2).to(reference.device)

        return self.placed.get((grid, reference.device), resize)


@dataclass(frozen=True, eq=False)
class SDXLHostIdentity(HostIdentity):
    """An identity prepared for the cross-attentions of an SDXL U-Net.

    Attributes:
        keys_values: layer key -> keys and values (2, N, D): of the identity, then of no identity.
        options: how the identity acts; its `span` is left to the program.
    """

    keys_values: Mapping[str, KeyValue] = field(default_factory=dict)
    options: IdentityOptions = field(default_factory=IdentityOptions)

    @classmethod
    @torch.no_grad()
    def prepare(
        cls,
        adapter: PuLID,
        identity: Identity,
        options: IdentityOptions,
        mask: Tensor | None = None,
    ) -> SDXLHostIdentity:
        """Compute the keys and values of all layers.

        Args:
            adapter: on the device on which they are computed; they are returned on the CPU.
            identity: the person.
            options: how it acts.
            mask: (H, W) in [0, 1]; None for everywhere.

        Raises:
            OptionError: A value is out of range.
            IdentityError: The identity has other sizes than the encoder reads.
        """
        positive = adapter.keys_values(adapter.encode_people([[(identity, None)]])[0])
        negative = adapter.keys_values(adapter.unconditional(identity.id_cond, identity.hidden))
        keys_values = {
            key: (
                _pair(positive[key][0], negative[key][0]),
                _pair(positive[key][1], negative[key][1]),
            )
            for key in positive
        }
        mask = None if mask is None else convert_mask(mask)
        return cls(options.scale, mask, keys_values=keys_values, options=options)

    def contribution(
        self,
        key: str,
        query: Tensor,
        text: Tensor,
        num_heads: int,
        is_negative: Sequence[bool],
        grid: Grid,
    ) -> Tensor:
        """Compute what the identity adds to the output of the text's attention.

        Args:
            key: of the layer.
            query: (B, L, D).
            text: output of the text's attention before the output projection, (B, L, D).
            num_heads: h.
            is_negative: per row whether it is of the negative prompt.
            grid: rows and columns of the positions; read with a mask only.

        Returns:
            (B, L, D), multiplied by the scale.

        Raises:
            OptionError: There is a mask, and the positions are not a grid of this size.
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
        region = self.region(grid, query)
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


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """The identity attention after one block, prepared for one identity.

    Attributes:
        num_heads: h.
        norm: weight and bias of the image tokens' LayerNorm, (dim,) each.
        epsilon: of the LayerNorm.
        projected: q_proj (2, dim, h * N) and v_proj (2, h * N, dim): of the identity, then of no
            identity.
    """

    num_heads: int
    norm: tuple[Tensor, Tensor]
    epsilon: float
    projected: tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class FluxHostIdentity(HostIdentity):
    """An identity prepared for the blocks of a FLUX transformer.

    Attributes:
        blocks: block -> identity attention.
    """

    blocks: Mapping[BlockKey, BlockAttention] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def prepare(
        cls,
        adapter: PuLIDFlux,
        blocks: Sequence[BlockKey],
        identity: Identity,
        scale: float = 1.0,
        mask: Tensor | None = None,
    ) -> FluxHostIdentity:
        """Compute what does not change from step to step.

        Args:
            adapter: on the device on which it is computed; the result is on the CPU.
            blocks: one per layer of the adapter, see `select_block_keys`.
            identity: the person.
            scale: weight of the identity.
            mask: (H, W) in [0, 1]; None for everywhere.

        Raises:
            OptionError: A value is out of range.
            IdentityError: The identity has other sizes than the encoder reads.
        """
        layers = dict(zip(blocks, adapter.layers, strict=True))
        tokens = adapter.encode_people([[(identity, None)]])
        negative_tokens = adapter.unconditional(identity.id_cond, identity.hidden)[:, None]
        positive = precompute_projections(layers, tokens)
        negative = precompute_projections(layers, negative_tokens)
        prepared = {}
        for block, layer in layers.items():
            pairs = zip(positive[block], negative[block], strict=True)
            q_proj, v_proj = (_pair(one[0], other[0]) for one, other in pairs)
            norm = layer.norm2
            prepared[block] = BlockAttention(
                layer.heads, (norm.weight.cpu(), norm.bias.cpu()), norm.eps, (q_proj, v_proj)
            )
        mask = None if mask is None else convert_mask(mask)
        return cls(scale, mask, blocks=prepared)

    def contribution(
        self, block: BlockKey, image: Tensor, is_negative: Sequence[bool], grid: Grid
    ) -> Tensor:
        """Compute what the identity adds to the image tokens after a block.

        Args:
            block: of the transformer.
            image: generated tokens without references, (B, L, dim).
            is_negative: per row whether it is of the negative prompt.
            grid: rows and columns of the tokens; read with a mask only.

        Returns:
            (B, L, dim), multiplied by the scale.

        Raises:
            OptionError: There is a mask, and the tokens are not a grid of this size.
        """
        attention = self.blocks[block]

        def place() -> tuple[Tensor, ...]:
            return tuple(x.to(image) for x in (*attention.norm, *attention.projected))

        weight, bias, *pairs = self.placed.get((block, image.device, image.dtype), place)
        normalized = layer_norm(image, weight.shape, weight, bias, attention.epsilon)
        q_proj, v_proj = (select_rows(x, is_negative) for x in pairs)
        added = attend_projected(normalized, q_proj, v_proj, attention.num_heads)
        region = self.region(grid, image)
        if region is not None:
            added = added * region.to(added)
        return self.scale * added


def select_rows(pair: Tensor, is_negative: Sequence[bool]) -> Tensor:
    """Return for each row the values of the identity, or of no identity.

    Args:
        pair: (2, ...), of the identity, then of no identity.
        is_negative: per row of the batch.

    Returns:
        (B, ...); a view if all rows are the same.
    """
    if len(set(is_negative)) == 1:
        return pair[int(is_negative[0])].expand(len(is_negative), *pair.shape[1:])
    return torch.stack([pair[int(negative)] for negative in is_negative])


def _pair(positive: Tensor, negative: Tensor) -> Tensor:
    """Concatenate values (1, ...) of the identity and of no identity, on the CPU."""
    return torch.cat([positive, negative]).cpu()
