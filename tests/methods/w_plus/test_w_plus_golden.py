"""W+ Adapter and e4e against the figures of the official code on seeded weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from openpulid.identity.e4e import E4E
from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.pulid import cross_attentions
from openpulid.methods.tuned.base import ActiveCall
from openpulid.methods.w_plus.attention import SecondAttention
from openpulid.methods.w_plus.encoders import LatentProjection, WPlusLayer, WPlusNetworks
from openpulid.methods.w_plus.w_plus import WPlusAdapter
from openpulid.training.w_plus.losses import WPlusLoss

TOLERANCE = 2e-5


@torch.no_grad()
def test_tokens(golden: Any) -> None:
    projection = golden.fill(LatentProjection(16, 32), "wplus.w_proj.")
    latents = golden.input("wplus.w", 2, 18, 16)
    assert golden.error("wplus.tokens", projection(latents)) < TOLERANCE
    zero = projection(torch.zeros_like(latents))
    assert golden.error("wplus.tokens_zero", zero) < TOLERANCE
    adapter = WPlusAdapter(WPlusNetworks(16, 32, {}))
    golden.fill(adapter.networks.w_proj, "wplus.w_proj.")
    negative, positive = adapter.encode_latents(latents)
    torch.testing.assert_close(negative, zero)
    torch.testing.assert_close(positive, projection(latents))


@torch.no_grad()
def test_tokens_of_published_size(golden: Any) -> None:
    projection = golden.fill(LatentProjection(512, 768), "wplus.full.w_proj.")
    tokens = projection(golden.input("wplus.full.w", 1, 18, 512))
    assert golden.error("wplus.full.tokens", tokens) < TOLERANCE


@pytest.fixture(scope="module")
def attention(golden: Any) -> Attention:
    layer = Attention(query_dim=64, cross_attention_dim=32, heads=4, dim_head=16)
    return golden.fill(layer, "attn2.")


@torch.no_grad()
def attend(golden: Any, attention: Attention, layer: WPlusLayer, scale: float) -> torch.Tensor:
    tokens = golden.input("wplus.tokens", 2, 4, 32)
    call = ActiveCall(PipelineState(attention), Span())
    added = SecondAttention(layer, torch.stack([0 * tokens, tokens]), 4, scale, call)
    handle = attention.to_out[0].register_forward_pre_hook(added.before_output)
    text = golden.input("wplus.text", 2, 7, 32)
    output = attention(golden.input("wplus.hidden", 2, 36, 64), text)
    handle.remove()
    return output


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.0])
def test_attention(golden: Any, attention: Attention, scale: float) -> None:
    layer = golden.fill(WPlusLayer(64, 32), "attn2.processor.")
    output = attend(golden, attention, layer, scale)
    assert golden.error(f"wplus.attn.scale_{scale}", output) < TOLERANCE


def test_untrained_layer_is_a_copy_of_the_texts(golden: Any, attention: Attention) -> None:
    output = attend(golden, attention, WPlusLayer.copy_of(attention), 1.0)
    assert golden.error("wplus.attn.initial", output) < TOLERANCE


@torch.no_grad()
def test_unet(golden: Any) -> None:
    unet = golden.fill(UNet2DConditionModel(**golden.manifest["tiny_sdxl_unet_config"]), "unet.")
    networks = WPlusNetworks.for_unet(unet, width=16)
    assert list(networks.wplus_adapter) == [str(index) for index in range(1, 24, 2)]
    first = networks.wplus_adapter["1"].get_parameter("to_q_wplus.weight")
    assert torch.equal(first, cross_attentions(unet)["1"].to_q.weight)
    adapter = WPlusAdapter(golden.fill(networks))
    tokens = golden.input("wplus.unet.tokens", 2, 4, 64)
    conditions = {
        "text_embeds": golden.input("unet.pooled", 2, 32),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2),
    }

    def call() -> torch.Tensor:
        sample = golden.input("unet.sample", 2, 4, 16, 16)
        text = golden.input("unet.text", 2, 9, 64)
        return unet(sample, 501, text, added_cond_kwargs=conditions).sample

    base = call()
    adapter.attach(unet)
    for scale in (1.0, 0.5):
        with adapter.use_tokens(torch.stack([0 * tokens, tokens]), scale):
            assert golden.error(f"wplus.unet.scale_{scale}", call()) < TOLERANCE
    assert torch.equal(call(), base)


def test_losses(golden: Any) -> None:
    pred, other, base, noise = (
        golden.input(f"wplus.{name}", 2, 4, 8, 8)
        for name in ("pred", "pred_other", "pred_base", "noise")
    )
    mask = torch.sigmoid(2 * golden.input("wplus.mask", 2, 1, 32, 32))
    parts = WPlusLoss().parts(pred, noise, other, base, mask)
    for name, value in parts.items():
        assert golden.error(f"wplus.loss.{name}", value) < TOLERANCE
    total = parts["rec"] + 0.6 * parts["disen"] + 0.4 * parts["preserve"]
    assert torch.allclose(WPlusLoss()(pred, noise, other, base, mask), total)
    other.requires_grad_()
    pred.requires_grad_()
    WPlusLoss()(pred, noise, other, base, mask).backward()
    assert other.grad is None and pred.grad is not None


@torch.no_grad()
def test_encoder(golden: Any, tmp_path: Any) -> None:
    """From a file in the published layout; 1.1 GB of weights, about 10 s of one core."""
    with torch.device("meta"):
        names = {name: x.shape for name, x in E4E().state_dict().items()}
    state = {}
    for name, shape in names.items():
        weight = golden.weight(f"e4e.encoder.{name}", shape)
        if name.endswith("running_var"):
            weight = 1 + weight.abs()
        if name.endswith("num_batches_tracked"):
            weight = torch.tensor(0)
        state[f"encoder.{name}"] = weight
    average = golden.input("latent_avg", 18, 512)
    state["decoder.input.input"] = torch.ones(1)
    torch.save({"state_dict": state, "latent_avg": average, "opts": {"n": 1}}, tmp_path / "e4e.pt")
    del state
    encoder = E4E.load(tmp_path / "e4e.pt")
    face = torch.tanh(golden.input("e4e.image", 1, 3, 256, 256))
    latents = encoder(face)
    (tmp_path / "e4e.pt").unlink()
    assert torch.equal(encoder.latent_avg, average)
    assert golden.error("e4e.w", latents - average) < TOLERANCE
