"""IP-Adapter, IP-Adapter-FaceID and InstantID in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from openpulid.methods.ip_adapter import (
    FaceID,
    InstantID,
    IPAdapterBase,
    export_adapter,
    trainable_layers,
)
from openpulid.methods.ip_adapter.ip_adapter import IPAdapter
from openpulid.mini.models import save_folder
from openpulid.mini.train.baselines.base import Baseline
from openpulid.mini.train.baselines.tensors import RANK, linear, norm, random, resampler

TOKENS = 4  # of IP-Adapter and IP-Adapter-FaceID
RESAMPLER_TOKENS = 4  # of InstantID's Resampler, a quarter of the published sixteen


class IPAdapterBaseline(Baseline):
    """IP-Adapter or IP-Adapter-FaceID: a single file."""

    method: IPAdapterBase

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the projection, keys and values, and the LoRA."""
        return export_adapter(self.method, pipe, path.with_suffix(".safetensors"))


class InstantIDBaseline(Baseline):
    """InstantID: a folder with the adapter and IdentityNet."""

    method: InstantID

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the adapter, and IdentityNet in 8 bits."""
        path.mkdir(parents=True, exist_ok=True)
        export_adapter(self.method, pipe, path / "ip-adapter.safetensors")
        trained = self.method.identity_net
        assert trained is not None
        net = ControlNetModel.from_config(trained.config)
        net.load_state_dict(trained.state_dict())
        save_folder(net, path / "ControlNetModel", in_8_bits=True)
        return path


def faceid(pipe: Any, face: int) -> Baseline:
    """Create IP-Adapter-FaceID: a small MLP, zero-initialized values, a LoRA of all attention.

    Args:
        pipe: the miniature's pipeline.
        face: width of the face embedding.
    """
    unet = pipe.unet
    cross = unet.config.cross_attention_dim
    projection = (
        linear("proj.0", 2 * face, face)
        | linear("proj.2", TOKENS * cross, 2 * face)
        | norm("norm", cross)
    )
    layers: dict[str, Tensor] = {}
    for index, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for q, module in (
            ("q", attention.to_q),
            ("k", attention.to_k),
            ("v", attention.to_v),
            ("out", attention.to_out[0]),
        ):
            layers[f"{index}.to_{q}_lora.down.weight"] = random(RANK, module.in_features)
            layers[f"{index}.to_{q}_lora.up.weight"] = torch.zeros(module.out_features, RANK)
    method = FaceID({"image_proj": projection, "ip_adapter": layers | keys_and_values(unet)})
    return IPAdapterBaseline(method, trainable_layers(method, pipe))


def style(pipe: Any, width: int) -> Baseline:
    """Create IP-Adapter: a linear layer to four tokens, zero-initialized values.

    Args:
        pipe: the miniature's pipeline.
        width: of CLIP's image embedding.
    """
    cross = pipe.unet.config.cross_attention_dim
    projection = linear("proj", TOKENS * cross, width) | norm("norm", cross)
    layers = keys_and_values(pipe.unet)
    method = IPAdapter({"image_proj": projection, "ip_adapter": layers})
    return IPAdapterBaseline(method, trainable_layers(method, pipe))


def instantid(pipe: Any, face: int) -> Baseline:
    """Create InstantID: a Resampler of four layers, and IdentityNet, a copy of the U-Net's encoder.

    IdentityNet's middle block has no attention, so that all weights fit into eight megabytes.

    Args:
        pipe: the miniature's pipeline.
        face: width of the face embedding.
    """
    unet = pipe.unet
    names = resampler(face, RESAMPLER_TOKENS, unet.config.cross_attention_dim)
    encoder = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 32))
    net = ControlNetModel.from_config({**encoder.config, "mid_block_type": "UNetMidBlock2D"})
    net.load_state_dict(encoder.state_dict(), strict=False)
    method = InstantID({"image_proj": names, "ip_adapter": keys_and_values(unet)}, net)
    net.requires_grad_(True)
    trained = nn.ModuleList([trainable_layers(method, pipe), net])
    return InstantIDBaseline(method, trained)


def keys_and_values(unet: Any) -> dict[str, Tensor]:
    """Create keys and zero values for every cross-attention, so that the output is unchanged."""
    tensors: dict[str, Tensor] = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            key = attention.to_k
            value = attention.to_v
            tensors[f"{index}.to_k_ip.weight"] = random(key.out_features, key.in_features)
            tensors[f"{index}.to_v_ip.weight"] = torch.zeros(value.out_features, value.in_features)
    return tensors
