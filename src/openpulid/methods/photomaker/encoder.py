"""PhotoMaker's id encoder (arXiv 2312.04461, section 3.2): CLIP's picture tower, fine-tuned, and what melts
a person into a word.

Entry names are the published files'; sizes come from the tensors. Shapes: n photos, k tokens of each, D width of SDXL's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.errors import WeightsError
from openpulid.identity.clip_extractor import clip_config
from openpulid.methods.pulid.encoders import PerceiverAttention

PERCEIVER_HEAD = 128


class MLP(nn.Module):
    """Norm, two linear layers; added to what came in where `residual`."""

    def __init__(self, width_in: int, width: int, residual: bool) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(width_in)
        self.fc1, self.fc2 = nn.Linear(width_in, width), nn.Linear(width, width)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(..., width_in) -> (..., width)."""
        out = self.fc2(gelu(self.fc1(self.layernorm(x))))
        return out + x if self.residual else out


class FuseModule(nn.Module):
    """A word's embedding and a person's token to the word of that person (equations 1 and 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp1 = MLP(2 * width, width, residual=False)
        self.mlp2 = MLP(width, width, residual=True)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, words: Tensor, people: Tensor) -> Tensor:
        """(T, D), (T, D) -> (T, D)."""
        return self.layer_norm(self.mlp2(self.mlp1(torch.cat([words, people], -1)) + words))


class Resampler(nn.Module):
    """Tokens that read a tower's states (Perceiver resampler, Flamingo, section 3.1.1)."""

    def __init__(self, dim: int, seen: int, depth: int = 4) -> None:
        super().__init__()
        self.proj_in, self.proj_out, self.norm_out = (
            nn.Linear(seen, dim),
            nn.Linear(dim, dim),
            nn.LayerNorm(dim),
        )
        head = min(PERCEIVER_HEAD, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, head, dim // head), _feed_forward(dim)])
            for _ in range(depth)
        )

    def forward(self, tokens: Tensor, states: Tensor) -> Tensor:
        """(n, k, dim), (n, 1 + N, seen) -> (n, k, dim)."""
        states = self.proj_in(states)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            tokens = tokens + attention(states, tokens)
            tokens = tokens + feed_forward(tokens)
        return self.norm_out(self.proj_out(tokens))


class QFormerPerceiver(nn.Module):
    """Version 2: tokens of the face embedding, which read the tower and are added to what they read."""

    def __init__(self, face: int, dim: int, tokens: int, seen: int) -> None:
        super().__init__()
        self.token_proj = nn.Sequential(
            nn.Linear(face, 4 * face), nn.GELU(), nn.Linear(4 * face, dim * tokens)
        )
        self.token_norm = nn.LayerNorm(dim)
        self.perceiver_resampler = Resampler(dim, seen)
        self.tokens = tokens

    def forward(self, faces: Tensor, states: Tensor) -> Tensor:
        """(n, face), (n, 1 + N, seen) -> (n, k, dim)."""
        tokens = self.token_norm(self.token_proj(faces).unflatten(-1, (self.tokens, -1)))
        return tokens + self.perceiver_resampler(tokens, states)


class PhotoMakerEncoder(CLIPVisionModelWithProjection):
    """The id encoder of both versions.

    Args:
        config: of the picture tower.
        width: D.
        face: width of the face embedding that version 2 reads; 0 is version 1.
        tokens: k, of version 2; version 1 has one of each photo.
    """

    def __init__(
        self, config: CLIPVisionConfig, width: int, face: int = 0, tokens: int = 1
    ) -> None:
        super().__init__(config)
        self.visual_projection_2 = nn.Linear(
            config.hidden_size, width - config.projection_dim, bias=False
        )
        self.fuse_module = FuseModule(width)
        self.tokens_per_photo = tokens
        self.face = face
        if face:
            self.qformer_perceiver = QFormerPerceiver(face, width, tokens, config.hidden_size)

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], config: CLIPVisionConfig | None = None
    ) -> PhotoMakerEncoder:
        """From the published tensors, strictly.

        Args:
            config: of the picture tower; CLIP-L's with the tensors' sizes where it is None.

        Raises:
            WeightsError: names are missing, or there are others.
        """
        try:
            model = cls(config or clip_config(tensors), *_sizes(tensors))
            model.load_state_dict(dict(tensors))
        except (KeyError, RuntimeError) as error:
            raise WeightsError(f"this is no id encoder of PhotoMaker: {error}") from error
        return model.eval().requires_grad_(False)

    def people(self, states: Tensor, faces: Tensor | None) -> Tensor:
        """Tokens of somebody.

        Args:
            states: (n, 1 + N, S), the tower's last.
            faces: (n, face), raw embeddings; version 2 alone reads them.

        Returns:
            (n, k, D).
        """
        if self.face:
            assert faces is not None
            return self.qformer_perceiver(faces, states)
        pooled = self.vision_model.post_layernorm(states[:, 0])
        return torch.cat([self.visual_projection(pooled), self.visual_projection_2(pooled)], -1)[
            :, None
        ]


def _sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """D, the width of the face embedding, and k."""
    text = tensors["fuse_module.layer_norm.weight"].shape[0]
    if (first := tensors.get("qformer_perceiver.token_proj.0.weight")) is None:
        return text, 0, 1
    last = tensors["qformer_perceiver.token_proj.2.weight"]
    return text, first.shape[1], last.shape[0] // text


def _feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 4 * dim, bias=False),
        nn.GELU(),
        nn.Linear(4 * dim, dim, bias=False),
    )
