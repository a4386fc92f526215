"""Error of bfloat16, the dtype of accelerators, against the reference; pytest -s prints it."""

from __future__ import annotations

import os

import pytest
import torch
from diffusers import UNet2DConditionModel

from openpulid.device import supports_bf16
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.flux_attention import PerceiverCrossAttention
from openpulid.methods.pulid.sdxl import PuLID

HALF = torch.bfloat16
large = pytest.mark.skipif(
    not supports_bf16(torch.device("cpu")) and "PULID_EMULATE" not in os.environ,
    reason="this CPU emulates bfloat16, which takes minutes; set PULID_EMULATE=1 to run it",
)


def report_error(golden, name: str, ours: torch.Tensor) -> float:
    error = golden.error(name, ours.float())
    print(f"{name}: {error:.4f}")
    return error


@large
@torch.no_grad()
def test_encoders_in_bf16(golden) -> None:
    hidden = [golden.input(f"vit{i}", 2, 577, 1024).to(HALF) for i in range(5)]
    face = golden.input("id_cond", 2, 1280).to(HALF)
    for kind, name in ((IDEncoder(), "idencoder.tokens"), (IDFormer(), "idformer.tokens")):
        assert (
            report_error(golden, name, golden.fill(kind, "id_adapter.").to(HALF)(face, hidden))
            < 0.03
        )


@large
@torch.no_grad()
def test_vision_encoder_in_bf16(golden, tmp_path) -> None:
    names = golden.manifest["eva02_clip_l_14_336_visual"]
    torch.save(
        {name: golden.weight(name, shape) for name, shape in names.items() if "rope" not in name},
        tmp_path / "eva.pt",
    )
    tower = VisionEncoder.from_published(tmp_path / "eva.pt").to(HALF)
    image = golden.input("eva.image", 1, 3, 336, 336).to(HALF)
    assert report_error(golden, "eva.embedding", tower.visual(image)) < 0.05
    for level, tokens in enumerate(tower(image)[1]):
        assert report_error(golden, f"eva.hidden_{level}.every_48th_token", tokens[:, ::48]) < 0.05


@large
@torch.no_grad()
def test_flux_attention_in_bf16(golden) -> None:
    layer = golden.fill(PerceiverCrossAttention(), "pulid_ca.0.").to(HALF)
    out = layer(
        golden.input("ca.id", 1, 32, 2048).to(HALF),
        golden.input("ca.latents", 1, 48, 3072).to(HALF),
    )
    assert report_error(golden, "perceiver_ca.out", out) < 0.02


@torch.no_grad()
def test_identity_attention_in_bf16_unet(golden) -> None:
    """Adds little to the U-Net's own error; only the sums over positions are in float32."""
    unet = golden.fill(UNet2DConditionModel(**golden.manifest["tiny_sdxl_unet_config"]), "unet.")
    adapter = PuLID.for_unet(unet, IDEncoder(12, 64, vit_dim=8, hidden_dim=16))
    for index, layer in adapter.id_adapter_attn_layers.items():
        golden.fill(layer, golden.manifest["tiny_sdxl_unet_processor_order"][int(index)] + ".")
    unet.to(HALF), adapter.to(HALF).attach(unet)
    ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)
    conditions = {"text_embeds": golden.input("unet.pooled", 2, 32).to(HALF), "time_ids": ids}
    inputs = (
        golden.input("unet.sample", 2, 4, 16, 16).to(HALF),
        501,
        golden.input("unet.text", 2, 9, 64).to(HALF),
    )

    def call() -> torch.Tensor:
        return unet(*inputs, added_cond_kwargs=conditions).sample

    plain = report_error(golden, "unet.base", call())
    for mode, projection, zeros in (
        ("none", "none", 0),
        ("v1", "ortho", 16),
        ("v2", "ortho_v2", 8),
        ("v2", "ortho_v2", 20),
    ):
        with adapter.use_tokens(
            golden.input("unet.id", 2, 10, 64).to(HALF), 0.8, projection=projection, num_zero=zeros
        ):
            assert (
                report_error(golden, f"unet.id.ortho_{mode}.zeros_{zeros}", call())
                < 1.5 * plain
                < 0.05
            )
