"""Identity attention of one cross-attention layer of SDXL as one function.

It runs as it is, or compiled as one region: its limit is the memory traffic between its many small
operations, which the compiler joins. Both give the same output but for rounding.

Shapes: J people, B batch of the U-Net, h heads, N identity tokens, d width of a head, D = h * d, L
image positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from openpulid.methods.pulid.projection import (
    Projection,
    attend,
    attend_once,
    compute_contribution,
)

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor, Projection, Tensor | None], tuple[Tensor, Tensor | None]]


def sum_contributions(
    query: Tensor,
    text: Tensor,
    keys_values: tuple[Tensor, Tensor],
    bias: Tensor | None,
    regions: Tensor | None,
    num_heads: int,
    projection: Projection,
    attend: Attend = attend,
) -> Tensor:
    """Compute what several identities add to the output of the text's attention.

    Args:
        query: (B, L, D).
        text: output of the text's attention, (B, L, D).
        keys_values: (J, B, h, N, d), zero tokens included.
        bias: (N,), of the zero tokens.
        regions: (J, B, L, 1) in [0, 1]; None for all positions.
        num_heads: h.
        projection: see `projection.compute_contribution`.
        attend: computes the attention, as `projection.attend`.

    Returns:
        (B, L, D), to be multiplied by the scale.
    """
    query = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    keys, values = (x.to(query.dtype) for x in keys_values)
    bias = None if bias is None else bias.to(query.dtype)
    total = None
    for person in range(len(keys)):
        output, share = attend(query, keys[person], values[person], projection, bias)
        identity = output.transpose(1, 2).flatten(2)
        region = None if regions is None else regions[person]
        added = compute_contribution(text, identity, projection, share, region)
        total = added if total is None else total + added
    assert total is not None, "there is at least one identity"
    return total


def add_identities(
    query: Tensor,
    text: Tensor,
    keys_values: tuple[Tensor, Tensor],
    bias: Tensor | None,
    regions: Tensor | None,
    scale: float | Tensor,
    num_heads: int,
    projection: Projection,
    attend: Attend = attend,
) -> Tensor:
    """Add every identity's output to that of the text.

    Args:
        query: see `sum_contributions`, as the following.
        text: see `sum_contributions`.
        keys_values: see `sum_contributions`.
        bias: see `sum_contributions`.
        regions: see `sum_contributions`.
        scale: weight of the identities; a scalar tensor does not compile again for another one.
        num_heads: see `sum_contributions`.
        projection: see `sum_contributions`.
        attend: see `sum_contributions`.

    Returns:
        (B, L, D).
    """
    total = sum_contributions(
        query, text, keys_values, bias, regions, num_heads, projection, attend
    ).to(text.dtype)
    if isinstance(scale, Tensor):
        return torch.addcmul(text, total, scale.to(text.dtype))
    return torch.add(text, total, alpha=scale)


def add_identities_once(
    query: Tensor,
    text: Tensor,
    keys_values: tuple[Tensor, Tensor],
    bias: Tensor | None,
    regions: Tensor | None,
    scale: Tensor,
    num_heads: int,
    projection: Projection,
) -> Tensor:
    """Do what `add_identities` does with one product of queries and keys, to be compiled."""
    return add_identities(
        query, text, keys_values, bias, regions, scale, num_heads, projection, attend_once
    )


@cache
def compile_layer() -> Callable[..., Tensor]:
    """Return `add_identities_once`, compiled on its first call with each shape.

    PyTorch keeps 8 shapes: further ones run as they are.
    """
    compiled: Callable[..., Tensor] = torch.compile(add_identities_once, dynamic=False)
    return compiled


@cache
def warn_not_compiled(reason: str) -> None:
    """Say once why identity attention is not compiled."""
    logger.warning(
        "identity attention cannot be compiled on this machine and runs without, with the same "
        "images: %s",
        reason,
    )


def run_compiled(*args: Any) -> Tensor | None:
    """Call the compiled layer; return None if it cannot be compiled, such as without g++ or Triton.

    Args:
        args: of `add_identities_once`.
    """
    try:
        return compile_layer()(*args)
    except torch._dynamo.exc.TorchDynamoException as error:
        warn_not_compiled(str(error).strip().partition("\n")[0])
        return None
