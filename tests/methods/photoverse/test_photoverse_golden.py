"""PhotoVerse's attention against figures of the paper's formula on seeded weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention

from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.level_mapper import LevelMapper
from openpulid.methods.photoverse.attention import Fusion, VisualAttention
from openpulid.methods.photoverse.encoders import PhotoVerseLayer
from openpulid.methods.tuned.base import ActiveCall
from openpulid.training.photoverse.losses import PhotoVerseLoss, draw_fusion, mean_size

TOLERANCE = 2e-5


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (2, 0, 1), (0, 2, 1), (1, 1, 0), (1, 0.5, 0.5)], ids=str
)
@torch.no_grad()
def test_attention(golden: Any, weights: tuple[float, float, float]) -> None:
    attention = golden.fill(
        Attention(query_dim=64, cross_attention_dim=32, heads=4, dim_head=16), "attn2."
    )
    layer = golden.fill(PhotoVerseLayer(64, 32, 4), "attn2.processor.")
    tokens = golden.input("photoverse.visual", 2, 5, 32)
    call = ActiveCall(PipelineState(attention), Span())
    visual = VisualAttention(layer, tokens, 4, Fusion(*weights), call)
    hidden = golden.input("photoverse.hidden", 2, 36, 64)
    text = golden.input("photoverse.text", 2, 7, 32)
    plain = attention(hidden, text)
    handles = list(visual.register(attention))
    output = attention(hidden, text)
    for handle in handles:
        handle.remove()
    gamma, sigma, alpha = weights
    name = f"photoverse.attn.gamma_{gamma}.sigma_{sigma}.alpha_{alpha}"
    assert golden.error(name, output) < TOLERANCE
    assert torch.equal(attention(hidden, text), plain)
    assert golden.error("photoverse.loss.values", mean_size(visual.values)) < TOLERANCE


@torch.no_grad()
def test_level_adapter_is_elites_mapper(golden: Any) -> None:
    """The paper says nothing of patches; ELITE's structure is taken, so its figure fits."""
    adapter = golden.fill(LevelMapper(24, 1024, 32), "elite.global.")
    words = adapter.words([golden.input(f"elite.emb{level}", 2, 17, 24) for level in range(5)])
    assert golden.error("elite.words", words) < TOLERANCE


def test_fusion_is_drawn_in_thirds() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_fusion(generator) for _ in range(300)]
    counts = {fusion: drawn.count(fusion) for fusion in drawn}
    assert counts.keys() == {Fusion(), Fusion(2.0, 0.0), Fusion(0.0, 2.0)}
    assert all(70 < count < 130 for count in counts.values())


def test_loss_is_a_weighted_sum() -> None:
    zero, one = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    same, opposite = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    words, values = -2 * torch.ones(1, 5, 3), [torch.ones(1, 5, 2), 3 * torch.ones(1, 5, 4)]
    loss = PhotoVerseLoss()
    assert float(loss(zero, one, (same, same), 0 * words, [0 * x for x in values])) == 1
    total = float(loss(zero, one, (same, opposite), words, values))
    assert total == pytest.approx(1 + 0.01 * 2 + 0.01 * 2 + 0.001 * 2)
