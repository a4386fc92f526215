"""ELITE against the figures of its official code, on seeded weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from openpulid.methods.elite import attention as elite_attention
from openpulid.methods.elite.attention import find_layers, hook_attention
from openpulid.methods.elite.encoders import Mapper, Mappers
from openpulid.methods.tuned.words import EncoderWord, read_words
from tests.conftest import Golden

TOLERANCE = 2e-5
ROWS = [(0, [3]), (1, [2])]
"""Entry and position of the word in each row of the figures' batches."""

INNER_DIM = 1024  # fixed in the authors' code
IDS = torch.tensor([[48, 5, 9, 7, 11, 12, *[49] * 10], [48, 8, 7, 13, *[49] * 12]])
PLACEHOLDER = 7


@pytest.fixture(scope="module")
def levels(golden: Golden) -> list[Tensor]:
    return [golden.input(f"elite.emb{level}", 2, 17, 24) for level in range(5)]


def create_mapper(golden: Golden, prefix: str, width: int = 32, **layers: int) -> Mapper:
    """Create a mapper by its published names."""
    mapper = Mapper(24, INNER_DIM, width, layers)
    tensors = {
        name: golden.weight(f"elite.{prefix}.{name}", x.shape)
        for name, x in mapper.state_dict().items()
    }
    return Mapper.from_tensors(tensors)


@pytest.fixture(scope="module")
def words(golden: Golden, levels: list[Tensor]) -> Tensor:
    return create_mapper(golden, "global").words(levels)


@torch.no_grad()
def test_words_and_patches(golden: Golden, levels: list[Tensor], words: Tensor) -> None:
    assert golden.error("elite.words", words) < TOLERANCE
    assert golden.error("elite.loss.words", words.abs().mean()) < TOLERANCE
    local = create_mapper(golden, "local")
    assert golden.error("elite.patches", local.patches(levels)) < TOLERANCE
    masks = ((2 * golden.input("elite.mask", 2, 1, 28, 28)).sigmoid() > 0.5).float()[:, 0]
    assert golden.error("elite.patches_masked", local.patches(levels, masks)) < TOLERANCE


@pytest.mark.parametrize("count", [1, 5])
@torch.no_grad()
def test_text_with_words(golden: Golden, words: Tensor, count: int) -> None:
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=48,
        eos_token_id=49,
        pad_token_id=49,
        hidden_act="quick_gelu",
    )
    encoder = golden.fill(CLIPTextModel(config), "elite.text_encoder.")
    embeddings: list[Tensor] = []
    states = []
    for ids, vectors in zip(IDS, words, strict=True):
        with read_words([EncoderWord(encoder, PLACEHOLDER, 49, vectors[:count])]):
            handle = encoder.get_input_embeddings().register_forward_hook(
                lambda module, args, output: embeddings.append(output)
            )
            states.append(encoder(ids[None]).last_hidden_state)
            handle.remove()
    assert golden.error(f"elite.embeds_{count}", torch.cat(embeddings)) < TOLERANCE
    assert golden.error(f"elite.text_{count}", torch.cat(states)) < TOLERANCE


def find_largest_weight_of_batch(word: Tensor) -> Tensor:
    """Find the largest attention (B, heads, L) of all images, as the authors' code does."""
    return word.amax((0, 1, 2), keepdim=True)


@contextmanager
def use_shared_maximum() -> Iterator[None]:
    """Weight local attention by the maximum of the batch, as in the figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elite_attention, "find_largest_weight", find_largest_weight_of_batch)
        yield


@contextmanager
def use_layer(golden: Golden, rows: Any, local_scale: float) -> Iterator[Attention]:
    """Hook one layer."""
    attention = golden.fill(
        Attention(query_dim=64, cross_attention_dim=32, heads=4, dim_head=16), "attn2."
    )
    mappers = Mappers(*(create_mapper(golden, name, attn2=64) for name in ("global", "local")))
    tokens = golden.input("elite.local_tokens", 2, 16, 32)
    with hook_attention({"attn2": attention}, mappers, tokens, lambda: rows, 1.0, local_scale):
        yield attention


@torch.no_grad()
def test_attention_of_a_layer(golden: Golden) -> None:
    hidden = golden.input("elite.hidden", 2, 36, 64)
    text = golden.input("elite.text", 2, 7, 32)
    for name, local_scale in (("global", 0.0), ("local_1.0", 1.0), ("local_0.8", 0.8)):
        with use_shared_maximum(), use_layer(golden, ROWS, local_scale) as attention:
            assert golden.error(f"elite.attn.{name}", attention(hidden, text)) < TOLERANCE
    for row, name in enumerate(("first", "second")):
        with use_layer(golden, ROWS[row : row + 1], 0.8) as attention:
            output = attention(hidden[row : row + 1], text[row : row + 1])
        assert golden.error(f"elite.attn.local_0.8.{name}_alone", output) < TOLERANCE
    local = create_mapper(golden, "local", attn2=64)
    values = local.matrix("attn2", "v")(golden.input("elite.local_tokens", 2, 16, 32))
    assert golden.error("elite.loss.values", values.abs().mean()) < TOLERANCE


@torch.no_grad()
def test_attention_of_a_unet(golden: Golden) -> None:
    unet = golden.fill(UNet2DConditionModel(**golden.manifest["tiny_sdxl_unet_config"]), "unet.")
    layers = find_layers(unet)
    sizes = {name: layer.to_k.out_features for name, layer in layers.items()}
    mappers = Mappers(*(create_mapper(golden, name, 64, **sizes) for name in ("global", "local")))
    tokens = golden.input("elite.unet.local_tokens", 2, 16, 64)
    rows: list[Any] = ROWS

    def call() -> Tensor:
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

    base = call()
    for name, local_scale in (("global_only", 0.0), ("lambda_0.8", 0.8), ("lambda_1.0", 1.0)):
        with (
            use_shared_maximum(),
            hook_attention(layers, mappers, tokens, lambda: rows, 1.0, local_scale),
        ):
            assert golden.error(f"elite.unet.{name}", call()) < TOLERANCE
    with hook_attention(layers, mappers, tokens, lambda: [None, None]):
        assert torch.equal(call(), base)
    # a row of no one has the other keys and values of the text, and no local attention
    with hook_attention(layers, mappers, tokens, lambda: rows, 1.0, 0.0):
        text_alone = call()
    with hook_attention(layers, mappers, tokens, lambda: [None, ROWS[1]]):
        output = call()
    assert torch.allclose(output[0], text_alone[0], atol=1e-6)
    assert not torch.allclose(output[1], text_alone[1], atol=1e-3)
    assert torch.equal(call(), base)
