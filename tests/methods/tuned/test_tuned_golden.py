"""The tuned methods against the figures of the official code on seeded weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from openpulid.methods.tuned.custom_diffusion import CustomDiffusion, detach_first_token
from openpulid.methods.tuned.lora import TunedLora
from openpulid.methods.tuned.words import EncoderWord, read_words

TOLERANCE = 2e-5
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def unet(golden) -> UNet2DConditionModel:
    return golden.fill(UNet2DConditionModel(**golden.manifest["tiny_sdxl_unet_config"]), "unet.")


@torch.no_grad()
def call(golden, unet) -> torch.Tensor:
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


@pytest.fixture(scope="module")
def lora(golden, unet) -> TunedLora:
    layers = {}
    for processor in unet.attn_processors:
        for suffix in LAYERS:
            name = processor.removesuffix("processor") + suffix
            layer = unet.get_submodule(name)
            down = golden.weight(f"lora.unet.{name}.lora_A.weight", (4, layer.in_features))
            up = golden.weight(f"lora.unet.{name}.lora_B.weight", (layer.out_features, 4))
            layers[name] = (down, 0.5 * up)
    return TunedLora({"unet": layers})


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_lora_changes_unet_like_peft(golden, unet, lora, scale):
    base = call(golden, unet)
    lora.attach(unet)
    with lora.use(scale=scale):
        output = call(golden, unet)
    assert golden.error(f"lora.unet.scale_{scale}", output) < TOLERANCE
    assert torch.equal(call(golden, unet), base)


def test_custom_diffusion_changes_keys_and_values(golden, unet):
    names = [
        f"{processor.removesuffix('processor')}to_{kind}.weight"
        for processor in unet.attn_processors
        if ".attn2." in processor
        for kind in "kv"
    ]
    matrices = {
        name: golden.weight(f"custom.unet.{name}", unet.get_parameter(name).shape) for name in names
    }
    method = CustomDiffusion(matrices)
    base = call(golden, unet)
    method.attach(unet)
    with method.use():
        output = call(golden, unet)
    assert golden.error("custom.unet", output) < TOLERANCE
    assert torch.equal(call(golden, unet), base)


def test_first_token_gets_no_gradient(golden):
    attention = golden.fill(
        Attention(query_dim=64, cross_attention_dim=32, heads=4, dim_head=16), "attn2."
    )
    for layer in (attention.to_k, attention.to_v):
        layer.register_forward_hook(detach_first_token)
    text = golden.input("custom.text", 2, 7, 32).requires_grad_()
    output = attention(golden.input("custom.hidden", 2, 36, 64), text)
    (output * golden.input("custom.cotangent", *output.shape)).sum().backward()
    assert golden.error("custom.out", output.detach()) < TOLERANCE
    assert golden.error("custom.grad_to_k", attention.to_k.weight.grad) < TOLERANCE
    assert golden.error("custom.grad_to_v", attention.to_v.weight.grad) < TOLERANCE
    assert golden.error("custom.grad_text", text.grad) < TOLERANCE


@pytest.mark.parametrize("eos", [2, 49])
@torch.no_grad()
def test_word_of_an_old_token_keeps_the_pooled_embedding_at_the_end(golden, eos):
    """With a new token and the old `eos_token_id` 2, transformers reads it at the word."""
    config = CLIPTextConfig(
        vocab_size=52,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=24,
        bos_token_id=48,
        eos_token_id=eos,
        pad_token_id=49,
        hidden_act="quick_gelu",
    )
    encoder = golden.fill(CLIPTextModelWithProjection(config), "ti.text_encoder.")
    vectors = 0.02 * golden.input("ti.vectors", 2, 32)
    ids = torch.tensor([[48, 5, 9, 7, *[49] * 12]])  # 9 becomes two tokens
    plain = encoder(ids, output_hidden_states=True)
    with read_words([EncoderWord(encoder, 9, 49, vectors)]):
        output = encoder(ids, output_hidden_states=True)
    assert golden.error("ti.hidden_last_but_one", output.hidden_states[-2]) < TOLERANCE
    assert golden.error("ti.pooled.eos_49", output.text_embeds) < TOLERANCE
    again = encoder(ids, output_hidden_states=True)
    assert torch.equal(again.text_embeds, plain.text_embeds)
    assert torch.equal(again.hidden_states[-2], plain.hidden_states[-2])
