"""FastComposer against the figures of its official code, on seeded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig

from openpulid.identity.clip_extractor import encode_clip, pad_to_square
from openpulid.methods.fastcomposer.encoders import FastComposerEncoder
from openpulid.methods.fastcomposer.fastcomposer import FastComposer
from openpulid.methods.photomaker.encoders import FuseModule
from openpulid.methods.prompt_fusion import fuse_words
from tests.conftest import Golden

TOLERANCE = 2e-5
MARKED = ([3, 6], [2])
"""Positions of the words for people in each prompt of the figures."""

CONFIG = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
    projection_dim=24,
    hidden_act="quick_gelu",
)


@pytest.mark.parametrize(("width", "name"), [(32, ""), (768, "768.")])
@torch.no_grad()
def test_words_are_fused(golden: Golden, width: int, name: str) -> None:
    """The second image of the second prompt is padding: one of its words is marked."""
    module = golden.fill(FuseModule(width), f"fastcomposer.{name}postfuse_module.")
    text = golden.input(f"fc.{name}text", 2, 10, width)
    people = golden.input(f"fc.{name}objects", 2, 2, 1, width)
    fused = torch.stack(
        [
            fuse_words(states, words, tokens[: len(words), 0], module)
            for states, words, tokens in zip(text, MARKED, people, strict=True)
        ]
    )
    words = torch.cat([states[words] for states, words in zip(fused, MARKED, strict=True)])
    assert golden.error(f"fastcomposer.{name}fused_tokens", words) < TOLERANCE
    if not name:
        assert golden.error("fastcomposer.postfuse", fused) < TOLERANCE
        with torch.autocast("cpu", torch.bfloat16):  # as in training
            reduced = fuse_words(text[0], MARKED[0], people[0, :, 0], module)
        assert reduced.dtype == torch.float32
        assert torch.allclose(reduced, fused[0], atol=0.1)


@torch.no_grad()
def test_images_are_encoded(golden: Golden, tmp_path: Path) -> None:
    """Square images, which the authors' code does not pad; the network is that of a whole file."""
    model = FastComposerEncoder(CONFIG)
    golden.fill(model.image_encoder, "fastcomposer.image_encoder.")
    images = golden.input("fc.images", 1, 2, 3, 40, 40).sigmoid()
    resized = [pad_to_square(image, 28) for image in images[0]]
    states = [encode_clip(model.image_encoder, image, -1)[1][0] for image in resized]
    tokens = model.encode(torch.cat(states))
    assert golden.error("fastcomposer.object_embeds", tokens[None, :, None]) < TOLERANCE

    state = {name: x.clone() for name, x in model.state_dict().items()}
    other = {f"{part}.weight": torch.ones(1) for part in ("text_encoder", "unet", "vae")}
    position_ids = {"image_encoder.vision_model.embeddings.position_ids": torch.arange(5)}
    torch.save({**state, **other, **position_ids}, tmp_path / "pytorch_model.bin")
    method = FastComposer.load(tmp_path / "pytorch_model.bin")
    assert method.encoder.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in method.encoder.state_dict().items())
    assert method.encoder.width == 24
    assert method.lora == {}
