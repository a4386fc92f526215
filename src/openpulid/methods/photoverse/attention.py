"""The visual attention of PhotoVerse, and its LoRA of the text's keys and values, as hooks.

With Q of the image, K_T and V_T of the text, K_S and V_S of the visual tokens, each layer computes
gamma * Attn(Q, K_T, V_T) + sigma * Attn(Q, K_S, V_S) (equation 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openpulid.methods.adapter import check_hooks_are_called, check_projections_are_called
from openpulid.methods.hooks import PipelineState, Span, expand_per_image
from openpulid.methods.lora import low_rank_hook
from openpulid.methods.photoverse.encoders import PhotoVerseLayer, PhotoVerseNetworks
from openpulid.methods.pulid import cross_attentions
from openpulid.methods.second_attention import attend
from openpulid.methods.tuned.base import ActiveCall


@dataclass(frozen=True)
class Fusion:
    """Weights of the parts of a layer.

    Attributes:
        text: gamma, of the text's attention.
        visual: sigma, of the visual attention.
        lora: a, of the LoRA of the text's keys and values.
    """

    text: float = 1.0
    visual: float = 1.0
    lora: float = 1.0


@contextmanager
def open_attention(
    networks: PhotoVerseNetworks, tokens: Tensor, fusion: Fusion, state: PipelineState, span: Span
) -> Iterator[None]:
    """Change every cross-attention of a pipeline's U-Net while the context is open.

    Args:
        networks: of a file.
        tokens: (P, 5, C), visual tokens of P identities.
        fusion: weights of the parts.
        state: of the pipeline.
        span: of the schedule in which they act.

    Raises:
        OptionError: the U-Net is compiled.
    """
    unet = state.network
    check_hooks_are_called(unet.modules())
    check_projections_are_called(unet)
    call = ActiveCall(state, span)
    with ExitStack() as hooks:
        handle = unet.register_forward_pre_hook(call.update, with_kwargs=True)
        hooks.callback(handle.remove)
        for key, attention in cross_attentions(unet).items():
            layer = networks.cross_attention[key]
            assert isinstance(layer, PhotoVerseLayer)
            visual = VisualAttention(layer, tokens, attention.heads, fusion, call)
            for handle in visual.register(attention):
                hooks.callback(handle.remove)
        yield


class VisualAttention:
    """The visual attention of one layer while tokens are in use.

    Args:
        layer: its weights.
        tokens: (P, 5, C).
        num_heads: of the layer.
        fusion: weights of the parts.
        call: of the U-Net.
    """

    def __init__(
        self,
        layer: PhotoVerseLayer,
        tokens: Tensor,
        num_heads: int,
        fusion: Fusion,
        call: ActiveCall,
    ) -> None:
        self.layer = layer
        self.num_heads = num_heads
        self.fusion = fusion
        self.call = call
        self.keys: Tensor = layer.to_k_visual(tokens)
        self.values: Tensor = layer.to_v_visual(tokens)
        self.query: Tensor | None = None

    def register(self, attention: Any) -> Iterator[Any]:
        """Register the hooks on a layer and return their handles."""
        for linear, change in (
            (attention.to_k, self.layer.to_k_lora),
            (attention.to_v, self.layer.to_v_lora),
        ):
            up = self.fusion.lora * change.up.weight
            hook = low_rank_hook(change.down.weight, up, self.call)
            yield linear.register_forward_hook(hook)
        yield attention.to_q.register_forward_hook(self._capture_query)
        yield attention.to_out[0].register_forward_pre_hook(self._before_output)

    def _capture_query(self, layer: Any, args: Any, query: Tensor) -> None:
        self.query = query

    def _before_output(self, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        query = self.query
        self.query = None
        if not self.call.is_active:
            return None
        assert query is not None, "a processor computes its queries with the layer's to_q"
        text = args[0]
        # the negative half has no visual tokens
        first = len(text) // 2 if self.call.state.is_guided() else 0
        rows = len(text) - first
        keys = expand_per_image(self.keys, rows, is_guided=False).to(query)
        values = expand_per_image(self.values, rows, is_guided=False).to(query)
        visual = attend(query[first:], keys, values, self.num_heads).to(text.dtype)
        positive = self.fusion.text * text[first:] + self.fusion.visual * visual
        return (torch.cat([text[:first], positive]), *args[1:])
