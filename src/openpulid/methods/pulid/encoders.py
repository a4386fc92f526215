"""The two identity encoders: face embedding and five levels of a vision tower -> tokens.

`IDEncoder` is v1's (PuLID, section 3.1), `IDFormer` is that of v1.1 and of FLUX. Entry names are the published
checkpoints', default sizes are theirs too; every size is an argument because the miniature uses others.

Shapes: B identities, n photos each, C face embedding + pooled vision embedding, N patches, D width of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

LEVELS = 5
"""How many hidden levels of the vision tower enter: from fine to abstract."""


def mlp(width_in: int, first: int, second: int, width_out: int) -> nn.Sequential:
    """Three linear layers with LayerNorm and LeakyReLU between."""
    return nn.Sequential(
        nn.Linear(width_in, first),
        nn.LayerNorm(first),
        nn.LeakyReLU(),
        nn.Linear(first, second),
        nn.LayerNorm(second),
        nn.LeakyReLU(),
        nn.Linear(second, width_out),
    )


def one_axis_per_photo(id_cond: Tensor) -> Tensor:
    """(B, C) or (B, n, C) -> (B, n, C)."""
    return id_cond[:, None] if id_cond.ndim == 2 else id_cond


class IDEncoder(nn.Module):
    """v1's encoder: `num_token` tokens from the embeddings, one more from each level of the tower.

    Args:
        width: C, length of `id_cond`.
        context_dim: width of the tokens, the U-Net's cross-attention width.
        num_token: tokens made from `id_cond`.
        vit_dim: D, width of the tower's hidden levels.
        hidden_dim: upper limit of the width inside the MLPs.
    """

    def __init__(
        self,
        width: int = 1280,
        context_dim: int = 2048,
        num_token: int = 5,
        vit_dim: int = 1024,
        hidden_dim: int = 1024,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "width": width,
            "context_dim": context_dim,
            "num_token": num_token,
            "vit_dim": vit_dim,
            "hidden_dim": hidden_dim,
        }
        self.num_token = num_token
        first, second = (min(context_dim * num_token // part, hidden_dim) for part in (4, 2))
        self.body = mlp(width, first, second, context_dim * num_token)
        for level in range(LEVELS):
            for name in ("mapping", "mapping_patch"):
                self.add_module(
                    f"{name}_{level}", mlp(vit_dim, hidden_dim, hidden_dim, context_dim)
                )

    def forward(self, id_cond: Tensor, hidden: Sequence[Tensor], mix: bool = False) -> Tensor:
        """Tokens of B identities.

        Args:
            id_cond: (B, C), or (B, n, C) for several photos.
            hidden: five times (B, n * (1 + N), D), each photo's class token first.
            mix: further photos give all their tokens, not only the `num_token` of their embeddings.

        Returns:
            (B, num_token + 5, context_dim) for one photo; the tokens of further photos follow.
        """
        id_cond = one_axis_per_photo(id_cond)
        photos = id_cond.shape[1]
        from_embedding = rearrange(self.body(id_cond), "b n (t d) -> b n t d", t=self.num_token)
        levels = [self._level(level, x, photos) for level, x in enumerate(hidden)]
        tokens = torch.cat(
            [from_embedding, torch.cat(levels, dim=2)], dim=2
        )  # (B, n, num_token + 5, context_dim)
        further = tokens[:, 1:] if mix else from_embedding[:, 1:]
        return torch.cat([tokens[:, 0], rearrange(further, "b n t d -> b (n t) d")], dim=1)

    def _level(self, level: int, x: Tensor, photos: int) -> Tensor:
        """(B, n * (1 + N), D) -> (B, n, 1, context_dim): the class token's MLP plus the mean of the patches' MLP."""
        x = rearrange(x, "b (n t) d -> b n t d", n=photos)
        whole = self.get_submodule(f"mapping_{level}")(x[:, :, :1])
        patches = self.get_submodule(f"mapping_patch_{level}")(x[:, :, 1:])
        return whole + patches.mean(dim=2, keepdim=True)

    def unconditional(self, id_cond: Tensor, hidden: Sequence[Tensor], mix: bool = False) -> Tensor:
        """Tokens of nobody, (1, T, context_dim), as many as the first of these identities has: zeros, encoded."""
        return self(torch.zeros_like(id_cond[:1]), [torch.zeros_like(x[:1]) for x in hidden], mix)


class PerceiverAttention(nn.Module):
    """Cross-attention of latents to a context *and to themselves* (Perceiver resampler, Flamingo, section 3.1.1)."""

    def __init__(self, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = dim_head * heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """(B, K, dim), (B, Q, dim) -> (B, Q, dim)."""
        context, latents = self.norm1(context), self.norm2(latents)
        key, value = self.to_kv(torch.cat([context, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (
            rearrange(x, "b t (h d) -> b h t d", h=self.heads)
            for x in (self.to_q(latents), key, value)
        )
        return self.to_out(rearrange(scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class IDFormer(nn.Module):
    """The encoder of v1.1 and FLUX: latents read the embedding's tokens and, two layers each, the tower's
    levels in order.

    Args:
        dim: width of the latents.
        depth: layers, a multiple of five.
        dim_head, heads: of each attention.
        num_id_token: tokens made from `id_cond` of each photo.
        num_queries: learned latents, the tokens that come out.
        output_dim: width of the tokens.
        ff_mult: width of the feed-forward layers over `dim`.
        width: C, length of `id_cond`.
        vit_dim: D, width of the tower's hidden levels.
        hidden_dim: width inside the MLPs.
    """

    def __init__(
        self,
        dim: int = 1024,
        depth: int = 10,
        dim_head: int = 64,
        heads: int = 16,
        num_id_token: int = 5,
        num_queries: int = 32,
        output_dim: int = 2048,
        ff_mult: int = 4,
        width: int = 1280,
        vit_dim: int = 1024,
        hidden_dim: int = 1024,
    ) -> None:
        super().__init__()
        if depth % LEVELS:
            raise ValueError(
                f"depth must be a multiple of {LEVELS}, the tower's levels; it is {depth}"
            )
        self.config: dict[str, Any] = {
            "dim": dim,
            "depth": depth,
            "dim_head": dim_head,
            "heads": heads,
            "num_id_token": num_id_token,
            "num_queries": num_queries,
            "output_dim": output_dim,
            "ff_mult": ff_mult,
            "width": width,
            "vit_dim": vit_dim,
            "hidden_dim": hidden_dim,
        }
        self.num_id_token, self.num_queries = num_id_token, num_queries
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim) * dim**-0.5)
        self.proj_out = nn.Parameter(torch.randn(dim, output_dim) * dim**-0.5)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head, heads), _feed_forward(dim, ff_mult)])
            for _ in range(depth)
        )
        for level in range(LEVELS):
            self.add_module(f"mapping_{level}", mlp(vit_dim, hidden_dim, hidden_dim, dim))
        self.id_embedding_mapping = mlp(width, hidden_dim, hidden_dim, dim * num_id_token)

    def forward(self, id_cond: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """Tokens of B identities, as many for several photos as for one.

        Args:
            id_cond: (B, C), or (B, n, C) for several photos.
            hidden: five times (B, n * (1 + N), D).

        Returns:
            (B, num_queries, output_dim).
        """
        identity = self.id_embedding_mapping(one_axis_per_photo(id_cond))
        identity = rearrange(identity, "b n (t d) -> b (n t) d", t=self.num_id_token)
        latents = torch.cat([self.latents.expand(len(identity), -1, -1), identity], dim=1)
        per_level = len(self.layers) // LEVELS
        for index, layer in enumerate(self.layers):
            attention, feed_forward = cast(nn.ModuleList, layer)
            if index % per_level == 0:
                level = index // per_level
                seen = self.get_submodule(f"mapping_{level}")(hidden[level])
                context = torch.cat([identity, seen], dim=1)
            latents = attention(context, latents) + latents
            latents = feed_forward(latents) + latents
        return latents[:, : self.num_queries] @ self.proj_out

    def unconditional(self, id_cond: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """Tokens of nobody, (1, num_queries, output_dim): one photo of zeros, encoded."""
        photos = one_axis_per_photo(id_cond).shape[1]
        nobody = id_cond.new_zeros(1, id_cond.shape[-1])
        return self(nobody, [torch.zeros_like(x[:1, : x.shape[1] // photos]) for x in hidden])


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


ENCODERS: dict[str, type[IDEncoder] | type[IDFormer]] = {
    "IDEncoder": IDEncoder,
    "IDFormer": IDFormer,
}
"""By the name that an adapter's file records."""
