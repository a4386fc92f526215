"""PuLID after the blocks of a transformer that another program runs, see `methods.host`.

The adapter is one for FLUX, or has the same layers for another transformer.

Shapes: B rows of the batch, L image tokens, N identity tokens, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from openpulid.identity.identity import Identity
from openpulid.methods.host import Grid, HostIdentity, pair_on_cpu, select_rows
from openpulid.methods.pulid.flux import PuLIDFlux, precompute_projections
from openpulid.methods.pulid.flux_attention import attend_projected
from openpulid.methods.pulid.masks import convert_masks
from openpulid.methods.transformer_kinds import BlockKey


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
        masks: Tensor | None = None,
    ) -> FluxHostIdentity:
        """Compute what does not change from step to step.

        Args:
            adapter: on the device on which it is computed; the result is on the CPU.
            blocks: one per layer of the adapter, see `select_block_keys`.
            identity: the person.
            scale: weight of the identity.
            masks: (H, W), or one per image of the batch (M, H, W), in [0, 1]; None for everywhere.

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
            q_proj, v_proj = (pair_on_cpu(one[0], other[0]) for one, other in pairs)
            norm = layer.norm2
            prepared[block] = BlockAttention(
                layer.heads, (norm.weight.cpu(), norm.bias.cpu()), norm.eps, (q_proj, v_proj)
            )
        return cls(scale, convert_masks(masks), blocks=prepared)

    def contribution(
        self,
        block: BlockKey,
        image: Tensor,
        is_negative: Sequence[bool],
        grid: Grid,
        num_images: int = 1,
    ) -> Tensor:
        """Compute what the identity adds to the image tokens after a block.

        Args:
            block: of the transformer.
            image: generated tokens without references, (B, L, dim).
            is_negative: per row whether it is of the negative prompt.
            grid: rows and columns of the tokens; read with a mask only.
            num_images: of the batch, each in one row per prompt; read with several masks only.

        Returns:
            (B, L, dim), multiplied by the scale.

        Raises:
            OptionError: There are masks, and the tokens are not a grid of this size, or the number
                of masks is neither one nor that of the images.
        """
        attention = self.blocks[block]

        def place() -> tuple[Tensor, ...]:
            return tuple(x.to(image) for x in (*attention.norm, *attention.projected))

        weight, bias, *pairs = self.placed.get((block, image.device, image.dtype), place)
        normalized = layer_norm(image, weight.shape, weight, bias, attention.epsilon)
        q_proj, v_proj = (select_rows(x, is_negative) for x in pairs)
        added = attend_projected(normalized, q_proj, v_proj, attention.num_heads)
        region = self.region(grid, image, num_images)
        if region is not None:
            added = added * region.to(added)
        return self.scale * added
