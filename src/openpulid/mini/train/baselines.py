"""Training of the baselines on the miniature: same images and same budget as PuLID's first stage.

The authors of all three methods train with L_diff alone. Here all of them use the loss weights and
timesteps of PuLID's first stage, so that only the methods differ. As its authors do, PhotoMaker
restricts the loss to the face in half of the steps (arXiv 2312.04461, section 4.1), and never drops
the identity.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import save_tensors
from openpulid.methods.ip_adapter import (
    FaceID,
    InstantID,
    IPAdapterBase,
    export_adapter,
    trainable_layers,
)
from openpulid.methods.photomaker.encoders import PhotoMakerEncoder
from openpulid.methods.photomaker.photomaker import PhotoMaker
from openpulid.training.pulid import (
    Batch,
)

TOKENS = 4  # of IP-Adapter-FaceID
RANK = 8  # of the LoRAs
RESAMPLER_TOKENS = 4  # of InstantID's Resampler, a quarter of the published sixteen
HEAD_WIDTH = 64  # of the Resampler's attention heads, the only width that diffusers builds
TRAINED_LAYERS = 2  # of four in PhotoMaker's vision encoder
VISION_CONFIG = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("patch_size", "image_size", "hidden_act"),
)
"""Constructor arguments of a CLIP vision encoder."""
PROJECTION_WIDTH = 64
"""Of PhotoMaker's first projection; the second fills the remaining width of the text embeddings."""


class Baseline:
    """A method in training.

    Attributes:
        method: attached by `BaselineTask`.
        trained: all modules that train.
        needs_identity: whether the method cannot run without an identity. Then identities are never
            dropped, and half of the steps restrict the loss to the face.
    """

    needs_identity = False

    def __init__(self, method: Any, trained: nn.Module) -> None:
        self.method = method
        self.trained = trained

    def identities(self, batch: Batch) -> list[Identity]:
        """Return the identities of a batch in the method's format."""
        assert batch.landmarks is not None
        return [
            Identity(id_cond[None, None], (), landmarks=landmarks[None, None])
            for id_cond, landmarks in zip(batch.id_cond, batch.landmarks, strict=True)
        ]

    def use(self, batch: Batch, pipe: Any) -> AbstractContextManager[Any]:
        """Open the method with the identities of a batch."""
        return self.method.use(self.identities(batch), scale=1.0, start=0.0, pipe=pipe)

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the method in its published layout, in half precision.

        Returns:
            The file or folder; a file's suffix is added to `path`.
        """
        raise NotImplementedError


class IPAdapterBaseline(Baseline):
    """IP-Adapter-FaceID: a single file."""

    method: IPAdapterBase

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the projection, keys and values, and the LoRA."""
        return export_adapter(self.method, pipe, path.with_suffix(".safetensors"))


class InstantIDBaseline(Baseline):
    """InstantID: a folder with the adapter and IdentityNet."""

    method: InstantID

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the adapter and IdentityNet."""
        path.mkdir(parents=True, exist_ok=True)
        export_adapter(self.method, pipe, path / "ip-adapter.safetensors")
        trained = self.method.identity_net
        assert trained is not None
        net = ControlNetModel.from_config(trained.config)
        net.load_state_dict(trained.state_dict())
        net.to(torch.bfloat16).save_pretrained(path / "ControlNetModel")
        return path


class PhotoMakerBaseline(Baseline):
    """PhotoMaker v1: conditioned on the class token of CLIP's last hidden state alone.

    The vision encoder's last layers train, so its input are the reference images.
    """

    needs_identity = True
    method: PhotoMaker

    def identities(self, batch: Batch) -> list[Identity]:
        """Return identities whose features are class tokens of the images in `batch.hidden`."""
        encoder = self.method.encoder
        side = encoder.config.image_size
        pixels = batch.hidden[0].unflatten(-1, (side, side))
        states = encoder.vision_model(pixel_values=pixels).last_hidden_state[:, :1]
        rows = zip(batch.id_cond, states, strict=True)
        return [Identity(row[None, None], (state[None], state[None])) for row, state in rows]

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the encoder and the LoRA, with the size of the vision encoder in the metadata."""
        lora: dict[str, Tensor] = {}
        for name, (down, up) in self.method.lora.items():
            lora |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        parts = {"id_encoder": self.method.encoder.state_dict(), "lora_weights": lora}
        flat = {
            f"{part}.{name}": x.detach().half()
            for part, tensors in parts.items()
            for name, x in tensors.items()
        }
        config = self.method.encoder.config
        names = (*VISION_CONFIG, "projection_dim")
        vision_config = json.dumps({name: getattr(config, name) for name in names})
        tensors = {name: x.cpu().contiguous() for name, x in flat.items()}
        file = path.with_suffix(".safetensors")
        return save_tensors(tensors, file, {"tower": vision_config})


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


def instantid(pipe: Any, face: int) -> Baseline:
    """Create InstantID: a Resampler of four layers, and IdentityNet, a copy of the U-Net's encoder.

    IdentityNet's middle block has no attention, so that all weights fit into eight megabytes.

    Args:
        pipe: the miniature's pipeline.
        face: width of the face embedding.
    """
    unet = pipe.unet
    cross = unet.config.cross_attention_dim
    names = {
        "latents": random(1, RESAMPLER_TOKENS, HEAD_WIDTH),
        **linear("proj_in", HEAD_WIDTH, face),
    }
    names |= linear("proj_out", cross, HEAD_WIDTH) | norm("norm_out", cross)
    for depth in range(4):
        layer = f"layers.{depth}"
        names |= (
            norm(f"{layer}.0.norm1", HEAD_WIDTH)
            | norm(f"{layer}.0.norm2", HEAD_WIDTH)
            | norm(f"{layer}.1.0", HEAD_WIDTH)
        )
        names |= {
            f"{layer}.0.to_q.weight": random(HEAD_WIDTH, HEAD_WIDTH),
            f"{layer}.0.to_kv.weight": random(2 * HEAD_WIDTH, HEAD_WIDTH),
            f"{layer}.0.to_out.weight": random(HEAD_WIDTH, HEAD_WIDTH),
            f"{layer}.1.1.weight": random(4 * HEAD_WIDTH, HEAD_WIDTH),
            f"{layer}.1.3.weight": random(HEAD_WIDTH, 4 * HEAD_WIDTH),
        }
    encoder = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 32))
    net = ControlNetModel.from_config({**encoder.config, "mid_block_type": "UNetMidBlock2D"})
    net.load_state_dict(encoder.state_dict(), strict=False)
    method = InstantID({"image_proj": names, "ip_adapter": keys_and_values(unet)}, net)
    net.requires_grad_(True)
    trained = nn.ModuleList([trainable_layers(method, pipe), net])
    return InstantIDBaseline(method, trained)


def photomaker(pipe: Any, clip: CLIPVisionModelWithProjection) -> Baseline:
    """Create PhotoMaker v1 on the miniature's CLIP.

    Its authors train a part of the vision encoder's layers (arXiv 2312.04461, section 3.2); here it
    is the last `TRAINED_LAYERS`.

    Args:
        pipe: the miniature's pipeline.
        clip: the vision encoder.
    """
    width = pipe.unet.config.cross_attention_dim
    sizes = {name: getattr(clip.config, name) for name in VISION_CONFIG}
    config = CLIPVisionConfig(**sizes, projection_dim=PROJECTION_WIDTH)
    encoder = PhotoMakerEncoder(config, width)
    encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
    encoder.requires_grad_(True).vision_model.requires_grad_(False)
    last_layers = encoder.vision_model.encoder.layers[-TRAINED_LAYERS:]
    seen = nn.ModuleList([*last_layers, encoder.vision_model.post_layernorm]).requires_grad_(True)
    lora: dict[str, Tensor] = {}
    for name in pipe.unet.attn_processors:
        layer = name.removesuffix(".processor")
        attention = pipe.unet.get_submodule(layer)
        for q in ("to_q", "to_k", "to_v", "to_out.0"):
            module = attention.get_submodule(q)
            lora[f"unet.{layer}.{q}.lora_A.weight"] = random(RANK, module.in_features)
            lora[f"unet.{layer}.{q}.lora_B.weight"] = torch.zeros(module.out_features, RANK)
    method = PhotoMaker(encoder, lora)
    method.lora = {
        name: (nn.Parameter(down), nn.Parameter(up)) for name, (down, up) in method.lora.items()
    }
    pairs = nn.ParameterList([x for pair in method.lora.values() for x in pair])
    trained = nn.ModuleList(
        [seen, encoder.visual_projection, encoder.visual_projection_2, encoder.fuse_module, pairs]
    )
    return PhotoMakerBaseline(method, trained)


def random(*shape: int) -> Tensor:
    """Draw an untrained weight, scaled by its fan-in."""
    return torch.randn(shape) / shape[-1] ** 0.5


def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
    """Create the untrained tensors of a linear layer."""
    return {f"{name}.weight": random(out, into), f"{name}.bias": torch.zeros(out)}


def norm(name: str, width: int) -> dict[str, Tensor]:
    """Create the tensors of a layer norm."""
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


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


BASELINES: Mapping[str, Callable[..., Baseline]] = {
    "faceid": faceid,
    "instantid": instantid,
    "photomaker": photomaker,
}
NAMES: Sequence[str] = tuple(BASELINES)
