"""Capture the queries and keys of a transformer block, before their rotation.

Shapes: B batch, S tokens of the sequence, d features of a head.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


class AttentionCapture:
    """Hooks on the attention of one block, which must compute its keys after its queries.

    Args:
        rotation_name: argument of the attention that has the rotary embedding.
        key_norm: name of the normalization whose output is captured as the keys.

    Attributes:
        calls: of each call the rotary embedding, and queries and keys (B, S, heads, d).
    """

    def __init__(self, rotation_name: str, key_norm: str) -> None:
        self.rotation_name = rotation_name
        self.key_norm = key_norm
        self.calls: list[tuple[Any, Tensor, Tensor]] = []
        self._rotation: Any
        self._query: Tensor

    def register(self, attn: Any, stack: ExitStack) -> None:
        """Register the hooks until the stack is closed."""
        for handle in (
            attn.register_forward_pre_hook(self._store_rotation, with_kwargs=True),
            attn.norm_q.register_forward_hook(self._store_query),
            getattr(attn, self.key_norm).register_forward_hook(self._store_call),
        ):
            stack.callback(handle.remove)

    def _store_rotation(self, attn: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._rotation = kwargs[self.rotation_name]

    def _store_query(self, norm: Any, args: Any, query: Tensor) -> None:
        self._query = query

    def _store_call(self, norm: Any, args: Any, key: Tensor) -> None:
        self.calls.append((self._rotation, self._query, key))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of features (B, S, heads, d) by unit numbers (B, S, d / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation.unsqueeze(2)).flatten(3).type_as(x)
