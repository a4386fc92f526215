"""The tokenizer with the closed vocabulary, and the cache of tokenized captions."""

from __future__ import annotations

from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerFast

from openpulid.mini.data.captions import Captions, token_ids
from openpulid.mini.models.tokenizer import LENGTH, build_tokenizer
from openpulid.world import VOCABULARY, Scene


def test_every_word_is_one_token_or_unknown():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(VOCABULARY) + 4
    ids = tokenizer("Portrait, purple elephant", add_special_tokens=False).input_ids
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids] == [
        "portrait",
        ",",
        "purple",
        "<|unknown|>",
    ]


def test_longest_prompt_fits():
    generator = torch.Generator().manual_seed(0)
    tokenizer = build_tokenizer()
    prompts = [Scene.sample(generator).prompt(generator, keep=1.0) for _ in range(300)]
    lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    assert 30 < max(lengths) <= LENGTH
    assert not (token_ids(tokenizer, prompts) == tokenizer.unk_token_id).any()


def test_tokenizer_round_trip(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    prompts = ["portrait, photo", "a person, poster, blue hat with a brim"]
    assert torch.equal(token_ids(loaded, prompts), token_ids(build_tokenizer(), prompts))


def test_captions_are_cached(tmp_path):
    class Data:
        num_scenes = 0
        key: ClassVar[dict[str, object]] = {}

        def __len__(self):
            return 3

        def scene(self, row):
            Data.num_scenes += 1
            return Scene(pose=("front", "left", "right")[row])

    captions = Captions.build(Data(), build_tokenizer(), tmp_path / "captions", variants=2)
    loaded = Captions.build(Data(), build_tokenizer(), tmp_path / "captions", variants=2)
    assert Data.num_scenes == 3
    Data.key = {"plan": "another"}
    Captions.build(Data(), build_tokenizer(), tmp_path / "captions", variants=2)
    assert Data.num_scenes == 6
    assert captions.tokens.shape == (3, 2, LENGTH) and (captions.tokens == loaded.tokens).all()
    assert captions.rows(torch.tensor([2, 0]), torch.tensor([1, 0])).tolist() == [
        *map(list, loaded.tokens[[2, 0], [1, 0]])
    ]
