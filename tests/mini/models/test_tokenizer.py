"""The closed vocabulary."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from openpulid.mini.data.captions import Captions, token_ids
from openpulid.mini.models.tokenizer import LENGTH, build_tokenizer
from openpulid.world import VOCABULARY, Scene


def test_every_word_is_one_token_or_unknown():
    words = build_tokenizer()
    assert len(words) == len(VOCABULARY) + 4
    ids = words("Portrait, purple elephant", add_special_tokens=False).input_ids
    assert [words.convert_ids_to_tokens(i) for i in ids] == [
        "portrait",
        ",",
        "purple",
        "<|unknown|>",
    ]


def test_longest_prompt_fits():
    generator, words = torch.Generator().manual_seed(0), build_tokenizer()
    sentences = [Scene.sample(generator).prompt(generator, keep=1.0) for _ in range(300)]
    lengths = [len(words(sentence).input_ids) for sentence in sentences]
    assert 30 < max(lengths) <= LENGTH
    assert not (token_ids(words, sentences) == words.unk_token_id).any()


def test_tokenizer_round_trip(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    sentences = ["portrait, photo", "a person, poster, blue hat with a brim"]
    assert torch.equal(token_ids(loaded, sentences), token_ids(build_tokenizer(), sentences))


def test_captions_are_cached(tmp_path):
    class Data:
        asked = 0

        def __len__(self):
            return 3

        def scene(self, row):
            Data.asked += 1
            return Scene(pose=("front", "left", "right")[row])

    made = Captions.build(Data(), build_tokenizer(), tmp_path / "captions", variants=2)
    again = Captions.build(Data(), build_tokenizer(), tmp_path / "captions", variants=2)
    assert Data.asked == 3
    assert made.tokens.shape == (3, 2, LENGTH) and (made.tokens == again.tokens).all()
    assert made.rows(torch.tensor([2, 0]), torch.tensor([1, 0])).tolist() == [
        *map(list, again.tokens[[2, 0], [1, 0]])
    ]
