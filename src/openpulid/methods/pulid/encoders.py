"""The two identity encoders: face embedding and five levels of a vision encoder -> tokens.

`IDEncoder` is that of v1 (PuLID, section 3.1), `IDFormer` that of v1.1 and of FLUX. Parameter
names and default sizes are those of the published checkpoints. Every size is an argument, because
the miniature uses smaller ones.

Shapes: B identities, n reference images each, C width of face embedding + pooled vision embedding,
N patches, D width of the vision encoder, T identity tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from openpulid.methods.level_mapper import NUM_LEVELS, mlp


def add_image_axis(id_cond: Tensor) -> Tensor:
    """Expand (B, C) to (B, 1, C); (B, n, C) stays."""
    return id_cond[:, None] if id_cond.ndim == 2 else id_cond


class IDEncoder(nn.Module):
    """The encoder of v1: `num_token` tokens of the embeddings, and one of each level.

    Args:
        width: C, width of `id_cond`.
        context_dim: width of the tokens, the U-Net's cross-attention width.
        num_token: number of tokens from `id_cond`.
        vit_dim: D, width of the vision encoder's hidden levels.
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
        token_dim = context_dim * num_token
        first = min(token_dim // 4, hidden_dim)
        second = min(token_dim // 2, hidden_dim)
        self.body = mlp(width, first, second, token_dim)
        for level in range(NUM_LEVELS):
            for name in ("mapping", "mapping_patch"):
                self.add_module(
                    f"{name}_{level}", mlp(vit_dim, hidden_dim, hidden_dim, context_dim)
                )

    def forward(self, id_cond: Tensor, hidden: Sequence[Tensor], mix: bool = False) -> Tensor:
        """Compute the tokens of B identities.

        Args:
            id_cond: (B, C), or (B, n, C) for several reference images.
            hidden: five times (B, n * (1 + N), D), the class token of each image first.
            mix: further images add all their tokens, not only the `num_token` of their embeddings.

        Returns:
            (B, num_token + 5, context_dim) for one image; the tokens of further images follow.
        """
        id_cond = add_image_axis(id_cond)
        num_images = id_cond.shape[1]
        from_embedding = rearrange(self.body(id_cond), "b n (t d) -> b n t d", t=self.num_token)
        levels = [self._encode_level(level, x, num_images) for level, x in enumerate(hidden)]
        # (B, n, num_token + 5, context_dim)
        tokens = torch.cat([from_embedding, torch.cat(levels, dim=2)], dim=2)
        further = tokens[:, 1:] if mix else from_embedding[:, 1:]
        return torch.cat([tokens[:, 0], rearrange(further, "b n t d -> b (n t) d")], dim=1)

    def _encode_level(self, level: int, x: Tensor, num_images: int) -> Tensor:
        """Add the MLP of the class token and the mean of the patches' MLP.

        Args:
            level: index of the level.
            x: (B, n * (1 + N), D).
            num_images: n.

        Returns:
            (B, n, 1, context_dim).
        """
        x = rearrange(x, "b (n t) d -> b n t d", n=num_images)
        class_token = self.get_submodule(f"mapping_{level}")(x[:, :, :1])
        patches = self.get_submodule(f"mapping_patch_{level}")(x[:, :, 1:])
        return class_token + patches.mean(dim=2, keepdim=True)

    def unconditional(self, id_cond: Tensor, hidden: Sequence[Tensor], mix: bool = False) -> Tensor:
        """Encode zeros of the first identity's shapes to (1, T, context_dim)."""
        return self(torch.zeros_like(id_cond[:1]), [torch.zeros_like(x[:1]) for x in hidden], mix)


class PerceiverAttention(nn.Module):
    """Cross-attention of latents to a context *and to themselves*.

    Perceiver resampler (Flamingo, section 3.1.1).
    """

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
        """Update latents (B, Q, dim) by a context (B, K, dim); returns (B, Q, dim)."""
        context = self.norm1(context)
        latents = self.norm2(latents)
        key, value = self.to_kv(torch.cat([context, latents], dim=1)).chunk(2, dim=-1)
        q = rearrange(self.to_q(latents), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(key, "b t (h d) -> b h t d", h=self.heads)
        v = rearrange(value, "b t (h d) -> b h t d", h=self.heads)
        return self.to_out(rearrange(scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


def build_feed_forward(dim: int, mult: int) -> nn.Sequential:
    """Build the feed-forward network of a layer; its hidden width is `mult` times `dim`."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


class IDFormer(nn.Module):
    """The encoder of v1.1 and FLUX.

    Latents attend to the tokens of the embedding and to the levels of the vision encoder in order,
    two layers per level.

    Args:
        dim: width of the latents.
        depth: number of layers, a multiple of five.
        dim_head, heads: of each attention.
        num_id_token: number of tokens from `id_cond` of each reference image.
        num_queries: number of learned latents, which are the output tokens.
        output_dim: width of the tokens.
        ff_mult: width of the feed-forward layers relative to `dim`.
        width: C, width of `id_cond`.
        vit_dim: D, width of the vision encoder's hidden levels.
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
        if depth % NUM_LEVELS:
            raise ValueError(
                f"depth must be a multiple of {NUM_LEVELS}, the number of levels; got {depth}."
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
        self.num_id_token = num_id_token
        self.num_queries = num_queries
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim) * dim**-0.5)
        self.proj_out = nn.Parameter(torch.randn(dim, output_dim) * dim**-0.5)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PerceiverAttention(dim, dim_head, heads), build_feed_forward(dim, ff_mult)]
            )
            for _ in range(depth)
        )
        for level in range(NUM_LEVELS):
            self.add_module(f"mapping_{level}", mlp(vit_dim, hidden_dim, hidden_dim, dim))
        self.id_embedding_mapping = mlp(width, hidden_dim, hidden_dim, dim * num_id_token)

    def forward(self, id_cond: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """Compute the tokens of B identities; their number does not depend on n.

        Args:
            id_cond: (B, C), or (B, n, C) for several reference images.
            hidden: five times (B, n * (1 + N), D).

        Returns:
            (B, num_queries, output_dim).
        """
        identity = self.id_embedding_mapping(add_image_axis(id_cond))
        identity = rearrange(identity, "b n (t d) -> b (n t) d", t=self.num_id_token)
        latents = torch.cat([self.latents.expand(len(identity), -1, -1), identity], dim=1)
        per_level = len(self.layers) // NUM_LEVELS
        for index, layer in enumerate(self.layers):
            attention, feed_forward = cast(nn.ModuleList, layer)
            if index % per_level == 0:
                level = index // per_level
                vision = self.get_submodule(f"mapping_{level}")(hidden[level])
                context = torch.cat([identity, vision], dim=1)
            latents = attention(context, latents) + latents
            latents = feed_forward(latents) + latents
        return latents[:, : self.num_queries] @ self.proj_out

    def unconditional(self, id_cond: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """Encode one reference image of zeros to (1, num_queries, output_dim)."""
        num_images = add_image_axis(id_cond).shape[1]
        embedding = id_cond.new_zeros(1, id_cond.shape[-1])
        levels = [torch.zeros_like(x[:1, : x.shape[1] // num_images]) for x in hidden]
        return self(embedding, levels)


ENCODERS: dict[str, type[IDEncoder] | type[IDFormer]] = {
    "IDEncoder": IDEncoder,
    "IDFormer": IDFormer,
}
"""By the name that the file of an adapter records."""
