"""How the identity's attention output joins the text's: plainly, or without what it would change in the
text's direction.

Shapes: B batch, h heads, L image positions, N identity tokens (zero tokens included), D = heads x width of one.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Projection = Literal["none", "ortho", "ortho_v2"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)

LEADING_TOKENS = 5
"""The tokens whose share of the attention decides, in ortho_v2, how much of the projection stays."""


def attend(query: Tensor, key: Tensor, value: Tensor, projection: Projection) -> tuple[Tensor, Tensor | None]:
    """Attention to the identity, and for ortho_v2 the share of its leading tokens.

    The share m is the softmax of the *unscaled* products, averaged over the heads and summed over the first
    `LEADING_TOKENS` tokens, as published; the attention itself is scaled as usual.

    Args:
        query: (B, h, L, d). key, value: (B, h, N, d).

    Returns:
        (B, h, L, d), and m (B, L, 1) or None.
    """
    if projection != "ortho_v2":
        return torch.nn.functional.scaled_dot_product_attention(query, key, value), None
    products = query @ key.transpose(-2, -1)  # (B, h, L, N)
    attended = (products * query.shape[-1] ** -0.5).softmax(-1) @ value
    share = products.softmax(-1)[..., :LEADING_TOKENS].sum(-1).mean(1)
    return attended, share[..., None]


def contribution(
    text: Tensor, identity: Tensor, projection: Projection, share: Tensor | None = None, region: Tensor | None = None
) -> Tensor:
    """What one identity adds to the text's output.

    none:     identity
    ortho:    identity - p
    ortho_v2: identity + (m - 1) * p

    where p = (sum_l text * identity / sum_l text * text) * text, per channel, is the component of the identity's
    output along the text's over the image positions l (PuLID's released code; not in the paper). A region weighs the
    positions in both sums and the result, so that nothing outside it is touched or counted.

    Args:
        text, identity: (B, L, D).
        share: m, (B, L, 1); for ortho_v2 only.
        region: (B, L, 1) in [0, 1]; None is everywhere.

    Returns:
        (B, L, D), for ortho and ortho_v2 in float32.
    """
    if projection == "none":
        return identity if region is None else identity * region.to(identity)
    text, identity = text.float(), identity.float()
    weighted = text if region is None else text * region.float()
    tiny = torch.finfo(torch.float32).tiny
    along = (weighted * identity).sum(-2, keepdim=True) / (weighted * text).sum(-2, keepdim=True).clamp_min(tiny)
    keep = -1.0 if share is None else share.float() - 1.0
    added = identity + keep * (along * text)
    return added if region is None else added * region.float()
