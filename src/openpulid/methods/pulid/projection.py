"""How the identity's attention output joins the text's: plainly, or without what it would change in the
text's direction.

Shapes: B batch, h heads, L image positions, N identity tokens, D = heads x width of one.
"""

from __future__ import annotations

from math import log
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

Projection = Literal["none", "ortho", "ortho_v2"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)

LEADING_TOKENS = 5
"""The tokens whose share of the attention decides, in ortho_v2, how much of the projection stays."""


def with_zeros(x: Tensor, zeros: int) -> Tensor:
    """Keys or values (..., N, d) with one row of zero for all zero tokens, if there are any."""
    return pad(x, (0, 0, 0, 1)) if zeros else x


def zeros_bias(key: Tensor, zeros: int) -> Tensor | None:
    """What makes the last of N keys stand for so many, (N,); None if there is none."""
    if not zeros:
        return None
    bias = key.new_zeros(key.shape[-2])
    bias[-1] = log(zeros)
    return bias


def attend(
    query: Tensor, key: Tensor, value: Tensor, projection: Projection, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention to the identity and its zero tokens, and for ortho_v2 the share of its leading tokens.

    The share m is the softmax of the *unscaled* products, averaged over the heads and summed over the first
    `LEADING_TOKENS` tokens, as published; the attention itself is scaled as usual.

    Zero tokens have zero keys and values (the layers have no bias), so one of them stands for all, with log(zeros) added to
    its product: the same softmax with a fraction of the columns.

    Args:
        query: (B, h, L, d). key, value: (B, h, N, d), see `with_zeros`.
        bias: added to the products, (N,), see `zeros_bias`.

    Returns:
        (B, h, L, d), and m (B, L, 1) or None.
    """
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=None if bias is None else bias.expand(1, 1, 1, -1)
    )
    if projection != "ortho_v2":
        return attended, None
    products = query @ key.transpose(-2, -1)  # (B, h, L, N)
    shares = (products if bias is None else products.add_(bias)).softmax(-1)
    return attended, shares[..., :LEADING_TOKENS].sum((1, -1))[..., None] / query.shape[1]


def contribution(
    text: Tensor,
    identity: Tensor,
    projection: Projection,
    share: Tensor | None = None,
    region: Tensor | None = None,
) -> Tensor:
    """What one identity adds to the text's output.

    none:     identity
    ortho:    identity - p
    ortho_v2: identity + (m - 1) * p

    where p = (sum_l text * identity / sum_l text * text) * text, per channel, is the component of the identity's
    output along the text's over the image positions l (PuLID's released code; not in the paper). A region weighs the
    positions in both sums and the result, so that nothing outside it is touched or counted. The sums are in float32.

    Args:
        text, identity: (B, L, D).
        share: m, (B, L, 1); for ortho_v2 only.
        region: (B, L, 1) in [0, 1]; None is everywhere.

    Returns:
        (B, L, D), for float16 in float32.
    """
    if projection == "none":
        return identity if region is None else identity * region.to(identity)
    if (
        text.dtype == torch.float16
    ):  # products of large outputs would overflow before they are summed
        text, identity = text.float(), identity.float()
    weighted = text if region is None else text * region.to(text)
    tiny = torch.finfo(torch.float32).tiny
    along = _summed(weighted, identity) / _summed(weighted, text).clamp_min(tiny)
    keep = text.new_full((1, 1, 1), -1.0) if share is None else (share - 1).to(text)
    added = torch.addcmul(identity, along.to(text) * text, keep)
    return added if region is None else added * region.to(added)


def _summed(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over the positions, (B, 1, D) in float32."""
    return (a * b).sum(-2, keepdim=True, dtype=torch.float32)
