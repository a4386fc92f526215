"""What bfloat16, which accelerators compute in, does to the reference's figures; `pytest tests/test_half.py -s` prints it."""

from __future__ import annotations

import os

import pytest
import torch

from openpulid.identity.vision import VisionTower
from openpulid.loading import multiplies_bf16
from openpulid.methods.pulid.dit import PerceiverCrossAttention
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer

HALF = torch.bfloat16
pytestmark = pytest.mark.skipif(
    not multiplies_bf16(torch.device("cpu")) and "PULID_EMULATE" not in os.environ,
    reason="this processor emulates bfloat16, which takes minutes; PULID_EMULATE=1 runs it all the same",
)


def told(golden, name: str, ours: torch.Tensor) -> float:
    error = golden.error(name, ours.float())
    print(f"{name}: {error:.4f}")
    return error


@torch.no_grad()
def test_encoders(golden) -> None:
    hidden = [golden.input(f"vit{i}", 2, 577, 1024).to(HALF) for i in range(5)]
    face = golden.input("id_cond", 2, 1280).to(HALF)
    for kind, name in ((IDEncoder(), "idencoder.tokens"), (IDFormer(), "idformer.tokens")):
        assert told(golden, name, golden.fill(kind, "id_adapter.").to(HALF)(face, hidden)) < 0.03


@torch.no_grad()
def test_vision_tower(golden, tmp_path) -> None:
    names = golden.manifest["eva02_clip_l_14_336_visual"]
    torch.save({name: golden.weight(name, shape) for name, shape in names.items() if "rope" not in name}, tmp_path / "eva.pt")
    tower = VisionTower.from_published(tmp_path / "eva.pt").to(HALF)
    image = golden.input("eva.image", 1, 3, 336, 336).to(HALF)
    assert told(golden, "eva.embedding", tower.visual(image)) < 0.05
    for level, tokens in enumerate(tower(image)[1]):
        assert told(golden, f"eva.hidden_{level}.every_48th_token", tokens[:, ::48]) < 0.05


@torch.no_grad()
def test_flux_attention(golden) -> None:
    layer = golden.fill(PerceiverCrossAttention(), "pulid_ca.0.").to(HALF)
    out = layer(golden.input("ca.id", 1, 32, 2048).to(HALF), golden.input("ca.latents", 1, 48, 3072).to(HALF))
    assert told(golden, "perceiver_ca.out", out) < 0.02
