"""Identity attention in one layer and in a U-Net: parity with the reference on seeded weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from openpulid.methods.hooks import SchedulePosition
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.projection import zero_token_bias
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.methods.pulid.sdxl_attention import (
    IdentityAttention,
    IdentityLayer,
    IdentityOptions,
    SDXLCall,
    SDXLInjection,
    create_identity_layers,
    grid_size,
)

MODES = {"none": "none", "v1": "ortho", "v2": "ortho_v2"}


@pytest.mark.parametrize("zeros", [0, 8, 20])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_layer_matches_reference(golden, mode: str, zeros: int) -> None:
    attention = golden.fill(
        Attention(query_dim=64, cross_attention_dim=32, heads=4, dim_head=16), "attn2."
    )
    layer = golden.fill(IdentityLayer(64, 32), "attn2.processor.")
    pair = tuple(x[:, None] for x in layer(golden.input("attn.id", 2, 10, 32)))  # (P, J, N, hidden)
    options = IdentityOptions(0.8, projection=MODES[mode], num_zero=zeros)
    injection = SDXLInjection(
        {"1": pair}, dict, lambda: False, lambda timestep: SchedulePosition(0.0), options
    )
    expanded = tuple(injection.expand(x, None, 2, 4, torch.device("cpu"), None) for x in pair)
    injection.calls[2] = SDXLCall(True, {"1": expanded}, zero_token_bias(expanded[0], zeros))
    handles = list(IdentityAttention("1", attention.heads, injection).register(attention))
    assert len(handles) == 2
    out = attention(golden.input("attn.hidden", 2, 36, 64), golden.input("attn.text", 2, 7, 32))
    assert golden.error(f"id_attention.ortho_{mode}.zeros_{zeros}", out) < 1e-4


@pytest.fixture(scope="module")
def unet(golden) -> Iterator[UNet2DConditionModel]:
    yield golden.fill(UNet2DConditionModel(**golden.manifest["tiny_sdxl_unet_config"]), "unet.")


@pytest.fixture(scope="module")
def adapter(golden, unet) -> PuLID:
    """Create an adapter with the seeded weights of the reference's attention processors."""
    adapter = PuLID.for_unet(unet, IDEncoder(12, 64, vit_dim=8, hidden_dim=16))
    order = golden.manifest["tiny_sdxl_unet_processor_order"]
    for index, layer in adapter.id_adapter_attn_layers.items():
        golden.fill(layer, order[int(index)] + ".")
    adapter.attach(unet)
    return adapter


def call(golden, unet: UNet2DConditionModel) -> torch.Tensor:
    conditions = {
        "text_embeds": golden.input("unet.pooled", 2, 32),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2),
    }
    return unet(
        golden.input("unet.sample", 2, 4, 16, 16),
        501,
        golden.input("unet.text", 2, 9, 64),
        added_cond_kwargs=conditions,
    ).sample


@pytest.mark.parametrize(("mode", "zeros"), [("none", 0), ("v1", 16), ("v2", 8), ("v2", 20)])
@torch.no_grad()
def test_unet_matches_reference(golden, unet, adapter, mode: str, zeros: int) -> None:
    baseline = call(golden, unet)
    assert golden.error("unet.base", baseline) < 1e-4
    with adapter.use_tokens(
        golden.input("unet.id", 2, 10, 64), scale=0.8, projection=MODES[mode], num_zero=zeros
    ):
        out = call(golden, unet)
    assert golden.error(f"unet.id.ortho_{mode}.zeros_{zeros}", out) < 1e-4
    assert torch.equal(call(golden, unet), baseline)


def test_layer_order_is_published_one(golden, unet) -> None:
    assert list(unet.attn_processors) == golden.manifest["tiny_sdxl_unet_processor_order"]
    sdxl = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        full = UNet2DConditionModel(**sdxl)
        layers = {
            f"id_adapter_attn_layers.{k}": list(x.shape)
            for k, x in create_identity_layers(full).state_dict().items()
        }
    assert list(full.attn_processors) == golden.manifest["sdxl_processor_order"]
    published = {
        k: v for k, v in golden.manifest["pulid_v1"].items() if not k.startswith("id_adapter.")
    }
    assert layers == published


def test_grid_size_rounds_up() -> None:
    assert grid_size(12, 12, 36) == (6, 6)
    assert grid_size(13, 21, 4 * 6) == (4, 6)
