"""The word that stands for a person: in prompts, in tokens and in text encoders."""

from __future__ import annotations

import pytest
import torch

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.tuned.words import (
    Trigger,
    encoder_words,
    find_token,
    read_words,
    repeat_token,
)
from tests.support import tiny_sdxl


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a woman and a man", "a sks woman and a man"),
        ("Woman, film noir", "sks woman, film noir"),
        ("film noir", "sks woman, film noir"),
        ("a person in the rain", "sks woman, a person in the rain"),
        ("a womanly hat", "sks woman, a womanly hat"),  # a part of a word is none
        ("a photo of SKS dancing", "a photo of SKS dancing"),
        ("", "sks woman"),
    ],
)
def test_prompt_without_the_word_gets_it(prompt, expected):
    assert Trigger("sks", "woman").insert(prompt) == expected


def test_word_can_replace_the_class_word():
    trigger = Trigger("sks", "woman", replaces_noun=True)
    assert trigger.insert("a woman and a man") == "a sks and a man"
    assert trigger.insert("film noir") == "sks, film noir"


def test_trigger_survives_a_files_metadata():
    trigger = Trigger("sks", "woman")
    assert Trigger.from_metadata(trigger.metadata()) == trigger
    assert Trigger.from_metadata({"trigger": "sks"}) == Trigger("sks", "person")
    assert Trigger.from_metadata({"format": "pt"}) is None


def test_repeated_token_moves_later_tokens_and_keeps_the_end():
    ids = torch.tensor([[0, 5, 6, 1, 1, 1], [0, 6, 5, 7, 8, 1], [0, 6, 7, 1, 1, 1]])
    expected = [[0, 5, 5, 5, 6, 1], [0, 6, 5, 5, 5, 1], [0, 6, 7, 1, 1, 1]]
    assert repeat_token(ids, 5, 3, end=1).tolist() == expected


def test_word_must_be_one_token():
    tokenizer = tiny_sdxl.tokenizer()
    assert find_token(tokenizer, "noir") == 6
    for word in ("red hat", "unheard"):
        with pytest.raises(OptionError, match="not one token"):
            find_token(tokenizer, word)


@torch.no_grad()
def test_text_encoders_read_the_vectors_while_open():
    pipe = tiny_sdxl.pipe()
    vectors = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 16)}

    def encode(prompt):
        return pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[0]

    prompts = ("a noir person", "a red person")
    plain = [encode(prompt) for prompt in prompts]
    with read_words(encoder_words(pipe, "noir", vectors)):
        named, other = map(encode, prompts)
    assert not torch.equal(named, plain[0])
    assert torch.equal(other, plain[1])  # a prompt without the word stays as it is
    assert torch.equal(encode(prompts[0]), plain[0])


def test_gradient_reaches_the_vectors_alone():
    pipe = tiny_sdxl.pipe()
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.requires_grad_(False)
    vectors = {
        "clip_l": torch.randn(1, 16, requires_grad=True),
        "clip_g": torch.randn(1, 16, requires_grad=True),
    }
    with read_words(encoder_words(pipe, "noir", vectors)):
        embeds = pipe.encode_prompt("noir hat", device="cpu", do_classifier_free_guidance=False)[0]
    embeds.square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in vectors.values())
    assert pipe.text_encoder.get_input_embeddings().weight.grad is None


def test_vectors_of_another_width_are_refused():
    vectors = {"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(1, 8)}
    with pytest.raises(WeightsError, match="clip_g has width 16"):
        encoder_words(tiny_sdxl.pipe(), "noir", vectors)
