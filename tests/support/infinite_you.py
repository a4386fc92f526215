"""A tiny random InfiniteYou with a visible effect, its files, and identities for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxControlNetModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection

from openpulid.identity.identity import Identity
from openpulid.methods.infiniteyou.encoders import FaceProjection
from openpulid.methods.infiniteyou.flux import InfiniteYou
from openpulid.methods.infiniteyou.infusenet import InfuseNet
from openpulid.methods.ip_adapter.export import projection_state
from tests.support.tiny_flux import tiny_controlnet

WIDTH = 6
"""Of a face embedding; 512 in the published files."""


def face(seed: int, photos: int = 1) -> Identity:
    """Create a random identity of a face recognition model alone."""
    generator = torch.Generator().manual_seed(seed)
    landmarks = 0.2 + 0.6 * torch.rand(1, photos, 5, 2, generator=generator)
    features = torch.randn(1, photos, WIDTH, generator=generator)
    return Identity(features, (), {"recognition": "abc"}, landmarks)


def tiny_resampler(output_dims: int = 24) -> IPAdapterPlusImageProjection:
    torch.manual_seed(2)
    sizes = {"hidden_dims": 16, "depth": 2, "dim_head": 64, "heads": 1, "num_queries": 3}
    return IPAdapterPlusImageProjection(WIDTH, output_dims, **sizes)


def tiny_method(pipe: Any, **sizes: Any) -> InfiniteYou:
    """Create InfiniteYou and attach it; `sizes` are those of `tiny_controlnet`."""
    method = InfiniteYou(FaceProjection(tiny_resampler()), InfuseNet(tiny_controlnet(**sizes)))
    method.attach(pipe)
    return method


def save_method(method: InfiniteYou, folder: Path) -> Path:
    """Write the files of a method as they are published, InfuseNet in several parts."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.clone() for name, x in projection_state(method.projection.resampler).items()}
    torch.save({"image_proj": tensors}, folder / "image_proj_model.bin")
    net: FluxControlNetModel = method.infusenet.model
    net.save_pretrained(folder / "InfuseNetModel", max_shard_size="200KB")
    return folder
