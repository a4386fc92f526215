"""ELITE's cross-attention: other keys and values of the text, and local attention to patches.

Shapes: B batch of the U-Net, L image positions, T text tokens, N local tokens, E entries of people,
D width of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from openpulid.errors import OptionError
from openpulid.methods.adapter import check_projections_are_called, resident_weight
from openpulid.methods.elite.encoders import Mapper, Mappers
from openpulid.methods.lora import delta_hook

Rows = Sequence[tuple[int, Sequence[int]] | None]
"""Per row of the batch the entry that it shows and the positions of its word; None for no one."""


def find_layers(unet: Any) -> dict[str, Any]:
    """Return the cross-attentions of a U-Net by their names in ELITE's files."""
    layers = {}
    for processor in unet.attn_processors:
        name = processor.removesuffix(".processor")
        if name.endswith("attn2"):
            layers[name.replace(".", "_")] = unet.get_submodule(name)
    return layers


@contextmanager
def hook_attention(
    layers: Mapping[str, Any],
    mappers: Mappers,
    tokens: Tensor | None,
    rows: Callable[[], Rows],
    scale: float = 1.0,
    local_scale: float = 0.8,
) -> Iterator[None]:
    """Register ELITE's attention while the context is open.

    Args:
        layers: from `find_layers`.
        mappers: with matrices for each layer.
        tokens: (E, N, width of the text), local tokens; None for the text alone.
        rows: of the current call. Nothing changes in a call without a row that shows an identity.
        scale: weight of the change of the text's keys and values, which all rows get.
        local_scale: weight of the local attention (the authors' lambda).
    """
    local = mappers.local_mapper
    with ExitStack() as stack:
        for name, layer in layers.items():
            check_projections_are_called(layer)
            for kind in "kv":
                projection = getattr(layer, f"to_{kind}")
                # peft wraps the layer of a user's LoRA
                base = getattr(projection, "base_layer", projection).weight
                matrix = mappers.global_mapper.matrix(name, kind).weight
                base = resident_weight(base)
                delta = scale * (matrix.to(base.device, torch.float32) - base.float())
                hook = delta_hook(delta.to(matrix.dtype), lambda: any(rows()))
                stack.callback(projection.register_forward_hook(hook).remove)
            if local is not None and tokens is not None and local_scale:
                attention = LocalAttention(
                    _project(local, name, "k", tokens),
                    _project(local, name, "v", tokens),
                    layer.heads,
                    local_scale,
                    rows,
                )
                for handle in attention.register(layer):
                    stack.callback(handle.remove)
        yield


@dataclass
class LocalAttention:
    """Local attention in one cross-attention layer, by hooks around its processor.

    Attributes:
        keys, values: (E + 1, N, D); the last entry is that of no one, all zero.
        num_heads: of the layer.
        scale: weight of the local attention.
        rows: returns those of the current call.
        query: (B, L, D) between the hooks of a call.
        key: (B, T, D) of the text, likewise.
    """

    keys: Tensor
    values: Tensor
    num_heads: int
    scale: float
    rows: Callable[[], Rows]
    query: Tensor | None = None
    key: Tensor | None = None

    def register(self, layer: Any) -> Iterator[Any]:
        """Register the hooks on a layer and return their handles."""
        yield layer.to_q.register_forward_hook(self._capture_query)
        yield layer.to_k.register_forward_hook(self._capture_key)
        yield layer.to_out[0].register_forward_pre_hook(self._before_output)

    def _capture_query(self, layer: nn.Module, args: Any, query: Tensor) -> None:
        self.query = query

    def _capture_key(self, layer: nn.Module, args: Any, key: Tensor) -> None:
        self.key = key

    def _before_output(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        query, key = self.query, self.key
        self.query = self.key = None  # do not keep them longer than a processor does
        rows = self.rows()
        if not any(rows):
            return None
        text: Tensor = args[0]
        if len(rows) != len(text):
            raise OptionError(
                "a patch of the U-Net's cross-attention has changed its batch (tiles), so "
                "identities cannot be assigned to images; use the pipeline without the patch."
            )
        assert query is not None, "a processor computes its queries with the layer's to_q"
        assert key is not None, "a processor computes its keys with the layer's to_k"
        entries = [len(self.keys) - 1 if row is None else row[0] for row in rows]
        positions = [0 if row is None else row[1][0] for row in rows]
        local = attend_locally(
            query,
            key,
            (self.keys.to(query)[entries], self.values.to(query)[entries]),
            positions,
            self.num_heads,
        )
        return (torch.add(text, local.to(text.dtype), alpha=self.scale), *args[1:])


def attend_locally(
    query: Tensor,
    key: Tensor,
    local: tuple[Tensor, Tensor],
    positions: Sequence[int],
    num_heads: int,
) -> Tensor:
    """Attend to local tokens where the image attends to the word.

    A position is weighted by its attention to the word over the largest one, see
    `find_largest_weight`.

    Args:
        query: (B, L, D).
        key: (B, T, D) of the text.
        local: keys and values (B, N, D).
        positions: B positions of the word among the T tokens.
        num_heads: of the layer.

    Returns:
        (B, L, D).
    """
    query, key, *keys_values = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, *local)
    )
    scores = query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
    rows = torch.arange(len(query), device=query.device)
    word = scores.softmax(-1)[rows, :, :, list(positions)]  # (B, heads, L)
    weight = (word / find_largest_weight(word)).to(query.dtype)
    attended = scaled_dot_product_attention(query, *keys_values) * weight[..., None]
    return attended.transpose(1, 2).flatten(2)


def find_largest_weight(word: Tensor) -> Tensor:
    """Find the largest attention to the word of each image, over all heads and positions.

    The authors' code has one maximum for the whole batch, so that an image depends on the others.

    Args:
        word: (B, heads, L), attention to the word.

    Returns:
        (B, 1, 1).
    """
    return word.amax((1, 2), keepdim=True)


def _project(mapper: Mapper, layer: str, kind: str, tokens: Tensor) -> Tensor:
    """Compute keys or values (E + 1, N, D) of local tokens, and zeros for no one."""
    projected = mapper.matrix(layer, kind)(tokens)
    return torch.cat([projected, torch.zeros_like(projected[:1])])
