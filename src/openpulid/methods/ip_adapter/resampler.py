"""The Resampler of IP-Adapter-Plus, InstantID and InfiniteYou, from its published names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from accelerate import init_empty_weights
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor

from openpulid.errors import WeightsError
from openpulid.io.checkpoints import load_state

# diffusers' names -> the published names
NAMES = {
    ".ln0.": ".0.norm1.",
    ".ln1.": ".0.norm2.",
    ".attn.to_q.": ".0.to_q.",
    ".attn.to_out.0.": ".0.to_out.",
    ".ff.0.": ".1.0.",
    ".ff.1.net.0.proj.": ".1.1.",
    ".ff.1.net.2.": ".1.3.",
}

KEY_OR_VALUE = re.compile(r"\.attn\.to_([kv])\.")
"""In diffusers' names; published files have keys and values in one matrix."""

DIM_HEAD = 64
"""Width of a head in all published files. The shapes do not tell it."""


def published_name(name: str) -> str:
    """Return the published name of one of diffusers' tensors."""
    for diffusers_name, published in NAMES.items():
        name = name.replace(diffusers_name, published)
    return KEY_OR_VALUE.sub(".0.to_kv.", name)


def build_resampler(
    tensors: Mapping[str, Tensor], dim_head: int = DIM_HEAD
) -> IPAdapterPlusImageProjection:
    """Build a Resampler of any depth from its published tensors.

    diffusers' own loader builds four layers, together with a U-Net's attention processors.

    Args:
        tensors: published name -> tensor; they are used as they are, not copied.
        dim_head: width of a head.

    Raises:
        KeyError: A tensor is missing.
        WeightsError: There are others, or a shape does not fit.
    """
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    hidden_dims = tensors["latents"].shape[2]
    with init_empty_weights(include_buffers=False):
        resampler = IPAdapterPlusImageProjection(
            embed_dims=tensors["proj_in.weight"].shape[1],
            output_dims=tensors["proj_out.weight"].shape[0],
            hidden_dims=hidden_dims,
            depth=len(layers),
            dim_head=dim_head,
            heads=tensors["layers.0.0.to_q.weight"].shape[0] // dim_head,
            num_queries=tensors["latents"].shape[1],
            ffn_ratio=tensors["layers.0.1.1.weight"].shape[0] / hidden_dims,
        )
    state = {}
    for name in resampler.state_dict():
        tensor = tensors[published_name(name)]
        match = KEY_OR_VALUE.search(name)
        state[name] = tensor if match is None else tensor.chunk(2)["kv".index(match[1])]
    unused = tensors.keys() - {published_name(name) for name in state}
    if unused:
        raise WeightsError(f"this Resampler has other tensors, such as {min(unused)}.")
    load_state(resampler, state, "this Resampler has tensors of other shapes", assign=True)
    return resampler.eval().requires_grad_(False)
