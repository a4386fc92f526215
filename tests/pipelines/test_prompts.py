"""Prompts: syntax of other programs, unknown words and signs, and what is read before loading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openpulid.errors import PromptError
from openpulid.mini.models.tokenizer import build_tokenizer
from openpulid.pipelines.presets import flux, mini, sdxl
from openpulid.pipelines.prompts import check_words, find_other_syntax, prepare_prompts
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.selection import with_method


@pytest.fixture
def byte_pipe() -> Any:
    """A pipeline whose tokenizer knows all bytes, as CLIP's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{byte: index + 1 for index, byte in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=77,
    )
    tokenizer.add_tokens("<s0>")
    return SimpleNamespace(tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a man, (smile:1.3), film noir", ["(smile:1.3)"]),
        ("<lora:detail:0.8>, a man", ["<lora:detail:0.8>"]),
        ("a man BREAK a hat", ["BREAK"]),
        ("a man, [old]", ["[old]"]),
        # not in the list of reports
        ("((smile)), (((hat)))", ["((smile))", "(((hat)))"]),
        ("[[smile]], [smile:laugh:0.5]", ["[[smile]]", "[smile:laugh:0.5]"]),
        ("{red|blue} hat, {{smile}}", ["{red|blue}", "{{smile}}"]),
        ("a man AND a hat", ["AND"]),
        ("hat::2 smile::-0.5, space:: ship", ["hat::2", "smile::-0.5", "space::"]),
        ("a man --ar 3:2 --no hands", ["--ar 3:2", "--no hands"]),
        ("a man \u2014ar 3:2", ["\u2014ar 3:2"]),
        ("embedding:easy, (embedding:x:1.2)", ["embedding:easy", "(embedding:x:1.2)"]),
        ("smile:1.2, a man", ["smile:1.2"]),
        ("a man\\n a hat", ["\\n"]),
        (r"a man \(actor\)", ["\\(", "\\)"]),
        ("\uff08smile\uff1a1.3\uff09", ["(smile:1.3)"]),  # full-width signs
        ("smile++, (red hat)-, (red hat)1.3", ["smile++", "(red hat)-", "(red hat)1.3"]),
        ('("red hat", "smile").blend(1, 1)', [").blend(1, 1)"]),
        ("__hair__ man", ["__hair__"]),
        ("a man | a hat", ["|"]),
        ("(a man, (smile:1.2), hat:1.1)", ["(smile:1.2)", "hat:1.1"]),
        ("[smile, a man", ["["]),
        ("portrait of a man img", ["img"]),
        ("a man Negative prompt: hat Steps: 20", ["Negative prompt:", "Steps: 20"]),
        # plain text
        ("portrait of a man (film noir), 35mm, f/1.8", []),
        ("a man - smiling - at 10:30, 16:9", []),
        ("a man \u2014 smiling; half--hearted: \"yes\" & no!", []),
        ("SALT AND PEPPER", []),
        ("Dr. No, 5'10\" tall, 50% gray, #1 @home", []),
    ],
)  # fmt: skip
def test_syntax_of_other_programs_is_found(prompt: str, parts: list[str]) -> None:
    assert find_other_syntax(prompt) == parts


def test_syntax_of_other_programs_is_noted(byte_pipe: Any, caplog: Any) -> None:
    request = sdxl().resolve(GenerationRequest(prompt="a man, <s0>", negative_prompt="blurry"))
    assert prepare_prompts(byte_pipe, request, sdxl()) == request
    assert not caplog.records  # a token of textual inversion has an effect
    request = sdxl().resolve(
        GenerationRequest(prompt="(smile:1.3) <lora:x:0.8> BREAK", negative_prompt="{old}")
    )
    assert prepare_prompts(byte_pipe, request, sdxl()) == request
    assert [record.getMessage() for record in caplog.records] == [
        "syntax of other programs has no effect in the prompt, it is read as plain words: "
        "'<lora:x:0.8>', 'BREAK'",
        "syntax of other programs has no effect in the negative prompt, it is read as plain words: "
        "'{old}'",
    ]


def test_own_negative_prompt_of_a_preset_is_not_noted(byte_pipe: Any, caplog: Any) -> None:
    """It is longer than what CLIP reads, and nobody typed it."""
    request = sdxl().resolve(GenerationRequest(prompt="a man"))
    assert prepare_prompts(byte_pipe, request, sdxl()) == request and not caplog.records
    typed = request.model_copy(update={"negative_prompt": f"{request.negative_prompt}, x"})
    prepare_prompts(byte_pipe, typed, sdxl())
    assert not caplog.records  # it is read in chunks
    prepare_prompts(byte_pipe, typed, with_method(sdxl(), "photomaker"))
    [record] = caplog.records
    assert "tokens and the model reads 77; it ignores the end, " in record.getMessage()


def test_unknown_words_of_other_syntax_are_named() -> None:
    with pytest.raises(PromptError) as error:
        check_words(mini(), GenerationRequest(prompt="portrait, (smiling:1.3), BREAK, {red}"))
    message = "syntax of other programs has no effect: 'BREAK', '{red}'."
    assert str(error.value).endswith(message)


def test_trigger_word_is_photomakers() -> None:
    assert find_other_syntax("a man img", "photomaker-v2") == []
    assert find_other_syntax("a man img", "instantid") == ["img"]


def test_words_are_checked_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)
    flux_preset = flux(tmp_path)
    build_tokenizer().save_pretrained(tmp_path / "tokenizer_2")
    for preset in (mini(), with_method(mini(), "faceid"), flux_preset):
        check_words(preset, GenerationRequest(prompt="portrait, film noir!"))
        with pytest.raises(PromptError, match="'zebra'") as error:
            check_words(preset, GenerationRequest(prompt="portrait of a zebra"))
        assert ("`pulid world words`" in str(error.value)) == preset.models.is_miniature
        with pytest.raises(PromptError, match="'zebra' in the negative prompt"):
            check_words(preset, GenerationRequest(prompt="portrait", negative_prompt="zebra"))
    # SDXL's tokenizer knows all words, and a single file has none
    check_words(sdxl(), GenerationRequest(prompt="portrait of a zebra"))
    check_words(flux(tmp_path / "none"), GenerationRequest(prompt="portrait of a zebra"))
