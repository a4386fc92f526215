"""The networks of PhotoVerse, re-implemented from the paper (section 3.2).

Shapes: S width of the vision encoder, C width of the text tokens, D width of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from openpulid.methods.level_mapper import LevelMapper
from openpulid.methods.pulid import cross_attentions
from openpulid.methods.second_attention import read_layer_shapes
from openpulid.methods.word_fusion import embedding_widths


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

    The paper does not say how both adapters combine patches. It takes the levels from ELITE, so
    they have ELITE's structure.

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
        self.text_adapter = LevelMapper(width, hidden, word_width)
        self.image_adapter = LevelMapper(width, hidden, token_width)
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
