"""How the output of identity attention is added to that of the text.

Either unchanged, or without its component along the text's output.

Shapes: B batch, h heads, L image positions, N identity tokens, d width of a head, D = h * d.
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
"""In ortho_v2, the attention to these tokens decides how much of the projection remains."""


def append_zero_row(x: Tensor, num_zero: int) -> Tensor:
    """Add one row of zeros to keys or values (..., N, d), which represents all zero tokens."""
    return pad(x, (0, 0, 0, 1)) if num_zero else x


def zero_token_bias(key: Tensor, num_zero: int) -> Tensor | None:
    """Return the bias (N,) that makes the last of N keys count as `num_zero` keys.

    None without zero tokens.
    """
    if not num_zero:
        return None
    bias = key.new_zeros(key.shape[-2])
    bias[-1] = log(num_zero)
    return bias


def attend(
    query: Tensor, key: Tensor, value: Tensor, projection: Projection, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention to the identity and its zero tokens.

    For ortho_v2, also compute the share m of the leading tokens: the softmax of the *unscaled*
    products, averaged over the heads and summed over the first `LEADING_TOKENS` tokens, as in the
    published code. The attention itself is scaled as usual.

    Zero tokens have zero keys and values (the layers have no bias). So one of them represents all,
    with log(num_zero) added to its product: the same softmax with a fraction of the columns.

    Args:
        query: (B, h, L, d).
        key: (B, h, N, d), see `append_zero_row`.
        value: (B, h, N, d).
        projection: see `compute_contribution`.
        bias: (N,), added to the products, see `zero_token_bias`.

    Returns:
        The output (B, h, L, d), and m (B, L, 1) or None.
    """
    mask = None if bias is None else bias.expand(1, 1, 1, -1)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if projection != "ortho_v2":
        return output, None
    products = query @ key.transpose(-2, -1)  # (B, h, L, N)
    weights = (products if bias is None else products.add_(bias)).softmax(-1)
    num_heads = query.shape[1]
    return output, weights[..., :LEADING_TOKENS].sum((1, -1))[..., None] / num_heads


def attend_once(
    query: Tensor, key: Tensor, value: Tensor, projection: Projection, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute what `attend` does, for ortho_v2 from one product of queries and keys.

    The scaled and the unscaled softmax share it. Compiled, this reads the queries once; as it is,
    every step of it would pass through memory, which is more than `attend` takes.

    Args:
        query: see `attend`, as the following.
        key: see `attend`.
        value: see `attend`.
        projection: see `attend`.
        bias: see `attend`.

    Returns:
        As `attend`.
    """
    if projection != "ortho_v2":
        return attend(query, key, value, projection, bias)
    num_heads, root = query.shape[1], query.shape[-1] ** 0.5
    if bias is not None:  # zero tokens add to the sums below, and nothing to the output
        key, value = key[..., :-1, :], value[..., :-1, :]
    products = (query @ key.transpose(-2, -1)).float() / root  # (B, h, L, N)
    highest = products.amax(-1, keepdim=True)
    if bias is not None:
        highest = highest.clamp_min(0)
    scaled = (products - highest).exp()
    unscaled = scaled**root  # exp(x * root) = exp(x) ** root saves an exponential
    scaled_sum, unscaled_sum = scaled.sum(-1, keepdim=True), unscaled.sum(-1, keepdim=True)
    if bias is not None:
        zero, num_zero = (-highest).exp(), bias[-1].float().exp()
        scaled_sum = scaled_sum + num_zero * zero
        unscaled_sum = unscaled_sum + num_zero * zero**root
    output = (scaled / scaled_sum).to(value.dtype) @ value
    leading = unscaled[..., :LEADING_TOKENS].sum(-1, keepdim=True)
    return output, (leading / unscaled_sum).sum(1) / num_heads


def compute_contribution(
    text: Tensor,
    identity: Tensor,
    projection: Projection,
    share: Tensor | None = None,
    region: Tensor | None = None,
) -> Tensor:
    """Compute what one identity adds to the output of the text's attention.

    none:     identity
    ortho:    identity - p
    ortho_v2: identity + (m - 1) * p

    where p = (sum_l text * identity / sum_l text * text) * text, per channel, is the component of
    the identity's output along the text's over the image positions l (PuLID's released code; not
    in the paper). A region weighs the positions in both sums and the result, so that nothing
    outside it is changed or counted. The sums are in float32.

    Args:
        text: (B, L, D), output of the text's attention.
        identity: (B, L, D), output of the identity's attention.
        projection: one of the above.
        share: m (B, L, 1), for ortho_v2 only.
        region: (B, L, 1) in [0, 1]; None for all positions.

    Returns:
        (B, L, D), in float32 if the text is in float16.
    """
    if projection == "none":
        return identity if region is None else identity * region.to(identity)
    if text.dtype == torch.float16:  # products of large outputs would overflow before the sum
        text = text.float()
        identity = identity.float()
    weighted = text if region is None else text * region.to(text)
    tiny = torch.finfo(torch.float32).tiny
    along = _sum_products(weighted, identity) / _sum_products(weighted, text).clamp_min(tiny)
    factor = text.new_full((1, 1, 1), -1.0) if share is None else (share - 1).to(text)
    added = torch.addcmul(identity, along.to(text) * text, factor)
    return added if region is None else added * region.to(added)


def _sum_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum the products over the positions, to (B, 1, D) in float32."""
    return (a * b).sum(-2, keepdim=True, dtype=torch.float32)
