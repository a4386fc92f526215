"""The names of FLUX.2's transformer in the files of its authors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

OUTER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
}
QKV = {
    "img_attn.qkv.weight": ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight"),
    "txt_attn.qkv.weight": tuple(f"attn.add_{x}_proj.weight" for x in "qkv"),
}
SINGLE = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}


def original_names(state: Mapping[str, Tensor], num_double: int = 3) -> dict[str, Tensor]:
    """Rename the tensors of diffusers' transformer; queries, keys and values are joined.

    The last modulation has shift and scale in the other order.
    """
    tensors = {}
    for name, tensor in state.items():
        group, index, *_ = name.split(".")
        inner = name.split(".", 2)[-1]
        module, _, kind = name.rpartition(".")
        if module in OUTER:
            tensors[f"{OUTER[module]}.{kind}"] = tensor.clone()
        elif group == "single_transformer_blocks":
            tensors[f"single_blocks.{index}.{SINGLE[inner]}"] = tensor.clone()
        elif inner in DOUBLE:
            tensors[f"double_blocks.{index}.{DOUBLE[inner]}"] = tensor.clone()
    for index in range(num_double):
        for joined, parts in QKV.items():
            names = [f"transformer_blocks.{index}.{part}" for part in parts]
            tensors[f"double_blocks.{index}.{joined}"] = torch.cat([state[name] for name in names])
    last = f"{OUTER['norm_out.linear']}.weight"
    tensors[last] = torch.cat(tensors[last].chunk(2)[::-1])
    return tensors
