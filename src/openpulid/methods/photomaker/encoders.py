"""PhotoMaker's id encoder (arXiv 2312.04461, section 3.2) and its fusion module.

The encoder is CLIP's vision encoder, fine-tuned. Parameter names are those of the published files;
sizes are read from the tensors.

Shapes: n reference images, k tokens of each, N patches, S width of the vision encoder, D width of
SDXL's text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.identity.clip_extractor import clip_config
from openpulid.io.checkpoints import (
    explain_bad_weights,
    load_state,
    parse_config,
    read_optional_metadata,
)
from openpulid.methods.pulid.encoders import PerceiverAttention, build_feed_forward

MAX_HEAD_DIM = 128
"""Width of an attention head of the resampler, or less in a smaller model."""


class MLP(nn.Module):
    """LayerNorm and two linear layers, with a skip connection if `residual`."""

    def __init__(self, width_in: int, width: int, residual: bool) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(width_in)
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, width)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width_in) to (..., width)."""
        out = self.fc2(gelu(self.fc1(self.layernorm(x))))
        return out + x if self.residual else out


class FuseModule(nn.Module):
    """Fuses the embedding of the class word with an identity token (equations 1 and 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp1 = MLP(2 * width, width, residual=False)
        self.mlp2 = MLP(width, width, residual=True)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, words: Tensor, tokens: Tensor) -> Tensor:
        """Fuse words (T, D) with tokens (T, D); returns (T, D)."""
        fused = self.mlp1(torch.cat([words, tokens], -1)) + words
        return self.layer_norm(self.mlp2(fused))


class Resampler(nn.Module):
    """Tokens attend to the states of a vision encoder.

    Perceiver resampler (Flamingo, section 3.1.1).

    Args:
        dim: width of the tokens.
        states_dim: S.
        depth: number of layers.
    """

    def __init__(self, dim: int, states_dim: int, depth: int = 4) -> None:
        super().__init__()
        self.proj_in = nn.Linear(states_dim, dim)
        self.proj_out = nn.Linear(dim, dim)
        self.norm_out = nn.LayerNorm(dim)
        dim_head = min(MAX_HEAD_DIM, dim)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = PerceiverAttention(dim, dim_head, dim // dim_head)
            self.layers.append(nn.ModuleList([attention, build_feed_forward(dim, 4)]))

    def forward(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Update tokens (n, k, dim) by states (n, 1 + N, S); returns (n, k, dim)."""
        states = self.proj_in(states)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            tokens = tokens + attention(states, tokens)
            tokens = tokens + feed_forward(tokens)
        return self.norm_out(self.proj_out(tokens))


class QFormerPerceiver(nn.Module):
    """Version 2: tokens of the face embedding attend to the states of the vision encoder.

    Args:
        face_dim: width of the face embedding.
        dim: width of the tokens.
        num_tokens: k.
        states_dim: S.
    """

    def __init__(self, face_dim: int, dim: int, num_tokens: int, states_dim: int) -> None:
        super().__init__()
        self.token_proj = nn.Sequential(
            nn.Linear(face_dim, 4 * face_dim), nn.GELU(), nn.Linear(4 * face_dim, dim * num_tokens)
        )
        self.token_norm = nn.LayerNorm(dim)
        self.perceiver_resampler = Resampler(dim, states_dim)
        self.num_tokens = num_tokens

    def forward(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Map embeddings (n, face_dim) and states (n, 1 + N, S) to tokens (n, k, dim)."""
        tokens = self.token_proj(embeddings).unflatten(-1, (self.num_tokens, -1))
        tokens = self.token_norm(tokens)
        return tokens + self.perceiver_resampler(tokens, states)


class PhotoMakerEncoder(CLIPVisionModelWithProjection):
    """The id encoder of both versions.

    Args:
        config: of the vision encoder.
        width: D.
        face_dim: width of the face embedding that version 2 reads; 0 for version 1.
        num_tokens: k of version 2; version 1 has one token per reference image.
    """

    def __init__(
        self, config: CLIPVisionConfig, width: int, face_dim: int = 0, num_tokens: int = 1
    ) -> None:
        super().__init__(config)
        self.visual_projection_2 = nn.Linear(
            config.hidden_size, width - config.projection_dim, bias=False
        )
        self.fuse_module = FuseModule(width)
        self.face_dim = face_dim
        if face_dim:
            self.qformer_perceiver = QFormerPerceiver(
                face_dim, width, num_tokens, config.hidden_size
            )

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], config: CLIPVisionConfig | None = None
    ) -> PhotoMakerEncoder:
        """Build the encoder from the published tensors.

        Args:
            tensors: by their published names.
            config: of the vision encoder; CLIP-L's with the tensors' sizes by default.

        Raises:
            WeightsError: Names are missing or unexpected.
        """
        message = "these are not weights of PhotoMaker's encoder"
        with explain_bad_weights(message):
            model = cls(config or clip_config(tensors), *_read_sizes(tensors))
        load_state(model, tensors, message)
        return model.eval().requires_grad_(False)

    def encode(self, states: Tensor, embeddings: Tensor | None) -> Tensor:
        """Compute the identity tokens.

        Args:
            states: (n, 1 + N, S), the last states of the vision encoder.
            embeddings: (n, face_dim), raw face embeddings, for version 2.

        Returns:
            (n, k, D).
        """
        if self.face_dim:
            assert embeddings is not None
            return self.qformer_perceiver(embeddings, states)
        pooled = self.vision_model.post_layernorm(states[:, 0])
        tokens = [self.visual_projection(pooled), self.visual_projection_2(pooled)]
        return torch.cat(tokens, -1)[:, None]


def read_vision_config(path: str | os.PathLike[str], message: str) -> CLIPVisionConfig | None:
    """Read the configuration of a vision encoder from a file's metadata (`tower`).

    Args:
        path: a file of weights; only safetensors has metadata.
        message: how the error begins if it is damaged.

    Returns:
        None if the file has none; then the vision encoder is CLIP-L's.

    Raises:
        WeightsError: It is damaged.
    """
    metadata = read_optional_metadata(path)
    if "tower" not in metadata:
        return None
    with explain_bad_weights(message):
        return CLIPVisionConfig(**parse_config(metadata["tower"], message))


def _read_sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Read D, the width of the face embedding and k from the tensors."""
    width = tensors["fuse_module.layer_norm.weight"].shape[0]
    first = tensors.get("qformer_perceiver.token_proj.0.weight")
    if first is None:
        return width, 0, 1
    last = tensors["qformer_perceiver.token_proj.2.weight"]
    return width, first.shape[1], last.shape[0] // width
