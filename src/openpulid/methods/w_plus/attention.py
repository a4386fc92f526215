"""The second attention of W+ Adapter, added by hooks.

The authors replace the attention processors. Here a hook on each layer's output projection adds the
second attention, so that a user's own processors, LoRAs and adapters still work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from openpulid.methods.adapter import exclusive_use
from openpulid.methods.hooks import PipelineState, Span, expand_per_image
from openpulid.methods.pulid import cross_attentions
from openpulid.methods.tuned.base import ActiveCall
from openpulid.methods.w_plus.encoders import WPlusLayer, WPlusNetworks

SLOT = "w_plus"


@contextmanager
def open_attention(
    networks: WPlusNetworks, tokens: Tensor, scale: float, state: PipelineState, span: Span
) -> Iterator[None]:
    """Add the second attention in every call of a pipeline's U-Net while the context is open.

    Args:
        networks: of a file.
        tokens: (2, P, 4, C), see `WPlusAdapter.encode`.
        scale: weight of the output.
        state: of the pipeline.
        span: of the schedule in which it acts.

    Raises:
        OptionError: another identity is in use, or the U-Net is compiled.
    """
    unet = state.network
    call = ActiveCall(state, span)
    with exclusive_use(unet, SLOT, hooked=unet.modules()), ExitStack() as hooks:
        handle = unet.register_forward_pre_hook(call.update, with_kwargs=True)
        hooks.callback(handle.remove)
        for key, attention in cross_attentions(unet).items():
            layer = networks.wplus_adapter[key]
            assert isinstance(layer, WPlusLayer)
            added = SecondAttention(layer, tokens, attention.heads, scale, call)
            handle = attention.to_out[0].register_forward_pre_hook(added.before_output)
            hooks.callback(handle.remove)
        yield


class SecondAttention:
    """The second attention of one layer while tokens are in use.

    Args:
        layer: its weights.
        tokens: (2, P, 4, C), see `WPlusAdapter.encode`.
        num_heads: of the layer.
        scale: weight of the output.
        call: of the U-Net.
    """

    def __init__(
        self, layer: WPlusLayer, tokens: Tensor, num_heads: int, scale: float, call: ActiveCall
    ) -> None:
        self.layer = layer
        self.num_heads = num_heads
        self.scale = scale
        self.call = call
        self.negative_keys, self.keys = layer.to_k_wplus(tokens)
        self.negative_values, self.values = layer.to_v_wplus(tokens)

    def before_output(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Add the output to that of the text (forward pre-hook of the output projection)."""
        if not self.call.is_active:
            return None
        text = args[0]
        rows = (len(text), self.call.state.is_guided())
        keys = expand_per_image(self.keys, *rows, self.negative_keys)
        values = expand_per_image(self.values, *rows, self.negative_values)
        added = self.layer(text, keys, values, self.num_heads)
        return (text + self.scale * added, *args[1:])
