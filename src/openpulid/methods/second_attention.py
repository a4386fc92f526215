"""A second attention in the cross-attention layers of a U-Net: what several methods share.

Shapes: B batch of the U-Net, L image positions, T tokens, D width of a layer, C width of the text
tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from openpulid.errors import WeightsError
from openpulid.io.checkpoints import explain_bad_weights, load_state, read_tensors
from openpulid.methods.pulid import cross_attentions

M = TypeVar("M", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]


def attend(query: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """Attend from queries (B, L, D) to keys and values (B, T, D); returns (B, L, D)."""
    heads = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, keys, values))
    return scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def read_layer_shapes(tensors: Mapping[str, Tensor], part: str, suffix: str) -> Shapes:
    """Return the shape of one matrix of each layer: layer key -> (D, C).

    Args:
        tensors: of a file, by names such as "PART.3.SUFFIX".
        part: what the names begin with.
        suffix: what they end with.
    """
    return {
        name.removeprefix(f"{part}.").removesuffix(f".{suffix}"): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith(f"{part}.") and name.endswith(f".{suffix}")
    }


def load_networks(
    build: Callable[[Mapping[str, Tensor]], M],
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    message: str,
) -> M:
    """Load a file into a frozen module, strictly.

    Args:
        build: creates the module with the sizes of the file's tensors.
        source: the file, or its tensors.
        message: how the error message begins if the file does not fit.

    Raises:
        WeightsError: the file is missing or damaged; a name is missing or unexpected, or a shape
            differs.
    """
    tensors = source if isinstance(source, Mapping) else read_tensors(source)
    with explain_bad_weights(message), init_empty_weights(include_buffers=False):
        module = build(tensors)
    load_state(module, tensors, message, assign=True)
    return module.eval().requires_grad_(False)


def check_layers(shapes: Shapes, unet: Any, origin: str) -> None:
    """Check that a file has one matrix for each cross-attention of a U-Net.

    Args:
        shapes: layer key -> (D, C). The key is the layer's place in `unet.attn_processors`.
        unet: the U-Net.
        origin: for which base model the method's files are.

    Raises:
        WeightsError: it was trained for another U-Net.
    """
    expected = {
        key: (layer.inner_dim, layer.cross_attention_dim)
        for key, layer in cross_attentions(unet).items()
    }
    if dict(shapes) != expected:
        raise WeightsError(
            f"this adapter was trained for another base model: it has {_describe(shapes)}, and "
            f"this U-Net has {_describe(expected)}; {origin}."
        )


def _describe(shapes: Shapes) -> str:
    widths = " and ".join(str(width) for width in sorted({shape[-1] for shape in shapes.values()}))
    return f"{len(shapes)} layers that read tokens of width {widths or 'unknown'}"
