"""The networks of PhotoVerse, re-implemented from the paper (section 3.2).

Shapes: n reference images, N patches, S width of the vision encoder, C width of the text tokens, D
width of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.identity.identity import Identity
from openpulid.methods.pulid import cross_attentions
from openpulid.methods.second_attention import read_layer_shapes
from openpulid.methods.word_fusion import embedding_widths

NUM_LEVELS = 5
"""Levels of the vision encoder; each becomes a word and a visual token."""


class LevelAdapter(nn.Module):
    """Five levels of a vision encoder -> five vectors.

    Each level has two nets with two hidden layers: one for the class token, and one whose outputs
    are averaged over the patches. The paper does not say how patches are combined; this is what
    ELITE does, from which PhotoVerse takes the levels.

    Args:
        width: S.
        hidden: width of the hidden layers; 1024 in the paper.
        out: width of a vector.
    """

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.out = out
        for level in range(NUM_LEVELS):
            self.add_module(f"mapping_{level}", _build_net(width, hidden, out))
            self.add_module(f"mapping_patch_{level}", _build_net(width, hidden, out))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Map five levels (n, 1 + N, S) to (n, 5, out)."""
        vectors = []
        for level, states in enumerate(levels):
            vector = self.get_submodule(f"mapping_{level}")(states[:, 0])
            patches = self.get_submodule(f"mapping_patch_{level}")(states[:, 1:])
            vectors.append(vector + patches.mean(1))
        return torch.stack(vectors, 1)


class LowRank(nn.Module):
    """A low-rank change of a linear layer."""

    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=False)


class PhotoVerseLayer(nn.Module):
    """One cross-attention layer: keys and values of the visual tokens, a LoRA of the text's.

    Args:
        width: D.
        token_width: C.
        rank: of the LoRA.
    """

    def __init__(self, width: int, token_width: int, rank: int) -> None:
        super().__init__()
        self.to_k_visual = nn.Linear(token_width, width, bias=False)
        self.to_v_visual = nn.Linear(token_width, width, bias=False)
        self.to_k_lora = LowRank(token_width, width, rank)
        self.to_v_lora = LowRank(token_width, width, rank)


class PhotoVerseNetworks(nn.Module):
    """All networks of a file.

    Args:
        width: S.
        hidden: width of the hidden layers of both adapters.
        word_width: of a word: both text encoders' widths together.
        token_width: C.
        layers: layer key -> (D, C).
        rank: of the LoRA.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        word_width: int,
        token_width: int,
        layers: Mapping[str, tuple[int, ...]],
        rank: int,
    ) -> None:
        super().__init__()
        self.text_adapter = LevelAdapter(width, hidden, word_width)
        self.image_adapter = LevelAdapter(width, hidden, token_width)
        self.cross_attention = nn.ModuleDict()
        for key, (width_out, width_in) in layers.items():
            self.cross_attention[key] = PhotoVerseLayer(width_out, width_in, rank)

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor]) -> PhotoVerseNetworks:
        """Create the networks with the sizes of a file's tensors."""
        hidden, width = tensors["text_adapter.mapping_0.0.weight"].shape
        word_width = tensors["text_adapter.mapping_0.6.bias"].shape[0]
        token_width = tensors["image_adapter.mapping_0.6.bias"].shape[0]
        layers = read_layer_shapes(tensors, "cross_attention", "to_k_visual.weight")
        rank = tensors[f"cross_attention.{next(iter(layers))}.to_k_lora.down.weight"].shape[0]
        return cls(width, hidden, word_width, token_width, layers, rank)

    @classmethod
    def for_pipeline(
        cls, pipe: Any, width: int, hidden: int = 1024, rank: int = 8
    ) -> PhotoVerseNetworks:
        """Create untrained networks for a pipeline of SDXL; they do not change the attention.

        Args:
            pipe: the pipeline.
            width: S.
            hidden: width of the hidden layers of both adapters.
            rank: of the LoRA.
        """
        layers = {
            key: (layer.inner_dim, layer.cross_attention_dim)
            for key, layer in cross_attentions(pipe.unet).items()
        }
        token_width = pipe.unet.config.cross_attention_dim
        networks = cls(width, hidden, sum(embedding_widths(pipe)), token_width, layers, rank)
        for name, weight in networks.named_parameters():
            if name.endswith(("to_v_visual.weight", "_lora.up.weight")):
                nn.init.zeros_(weight)
        return networks


def read_levels(identity: Identity) -> list[Tensor]:
    """Return the five levels (n, 1 + N, S) of an identity, the deepest first.

    The identity has them from the shallowest to the deepest.
    """
    *shallow, deepest = (x[0].unflatten(0, (identity.photos, -1)) for x in identity.hidden)
    return [deepest, *shallow]


def _build_net(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.LayerNorm(hidden),
        nn.LeakyReLU(),
        nn.Linear(hidden, hidden),
        nn.LayerNorm(hidden),
        nn.LeakyReLU(),
        nn.Linear(hidden, out),
    )
