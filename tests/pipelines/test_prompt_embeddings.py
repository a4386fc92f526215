"""Prompts with weights and long prompts on SDXL, next to diffusers' `encode_prompt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from openpulid.errors import OptionError
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import NEGATIVE_PROMPT, flux, mini, sdxl
from openpulid.pipelines.prompt_embeddings import encode_prompts
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import InitImage, Person
from openpulid.pipelines.selection import with_method
from openpulid.pipelines.studio import Studio
from tests.support.people import anna
from tests.support.studios import SIDE, pixels, run_diffusers, sdxl_studio
from tests.support.tiny_flux import tiny_pipe

LONG = "portrait of a person, red hat, blue background, film noir, smiling, green hat"
"""Eighteen tokens with the signs, of which the tiny pipeline's CLIP reads ten."""


@pytest.fixture(scope="module")
def studio(tiny_pipeline: Any) -> Studio:
    return sdxl_studio(tiny_pipeline())


def embeddings(studio: Studio, prompt: str, negative: str | None = "") -> dict[str, Any]:
    request = GenerationRequest(prompt, negative_prompt=negative)
    request = request if negative is None else studio.preset.resolve(request)
    return dict(encode_prompts(studio.pipe, request, studio.preset))


def encode(studio: Studio, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = studio.pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    return embeds, pooled


def test_prompt_without_weights_stays_text(studio: Studio) -> None:
    expected = {
        "portrait, film noir": "portrait, film noir",
        "(portrait:1.0)": "portrait",
        # the small tokenizer knows no brackets
        "portrait (film noir)": "portrait film noir",
        r"portrait \(film\)": "portrait film",
    }
    for prompt, text in expected.items():
        assert embeddings(studio, prompt) == {"prompt": text, "negative_prompt": ""}
    plain = studio.generate("portrait", seed=5).images[0]
    assert np.array_equal(pixels(plain), run_diffusers(studio))


def test_a_weight_scales_the_difference_to_the_empty_prompt(studio: Studio) -> None:
    encoded = embeddings(studio, "portrait, (red hat:1.5)")
    empty, _ = encode(studio, "")
    plain, pooled = encode(studio, "portrait, red hat")
    expected = plain.clone()
    words = slice(3, 5)  # after the start, a word and a comma
    expected[:, words] = empty[:, words] + 1.5 * (plain - empty)[:, words]
    assert torch.allclose(encoded["prompt_embeds"], expected, atol=1e-5)
    assert torch.allclose(encoded["pooled_prompt_embeds"], pooled, atol=1e-5)
    negative, negative_pooled = encode(studio, "")
    assert torch.allclose(encoded["negative_prompt_embeds"], negative, atol=1e-5)
    assert torch.allclose(encoded["negative_pooled_prompt_embeds"], negative_pooled, atol=1e-5)
    weaker = embeddings(studio, "portrait, [red hat]")["prompt_embeds"]
    assert 1e-4 < (weaker - plain).abs().max() < (expected - plain).abs().max()


def test_a_missing_negative_prompt_is_the_pipelines(studio: Studio) -> None:
    """SDXL's pipelines use zeros."""
    encoded = embeddings(studio, "(portrait:1.2)", None)
    assert not encoded["negative_prompt_embeds"].any()
    assert encoded["negative_prompt_embeds"].shape == encoded["prompt_embeds"].shape


def test_long_prompt_is_its_chunks(studio: Studio) -> None:
    """The negative prompt is padded with the empty prompt."""
    encoded = embeddings(studio, LONG, "blue hat")
    parts = ["portrait of a person, red hat, blue background", ", film noir, smiling, green hat"]
    chunks = [encode(studio, part) for part in parts]
    expected = torch.cat([embeds for embeds, _ in chunks], dim=1)
    assert encoded["prompt_embeds"].shape == expected.shape
    assert torch.allclose(encoded["prompt_embeds"], expected, atol=1e-5)
    assert torch.allclose(encoded["pooled_prompt_embeds"], encode(studio, LONG)[1], atol=1e-5)
    empty, _ = encode(studio, "")
    negative = torch.cat([encode(studio, "blue hat")[0], empty], dim=1)
    assert torch.allclose(encoded["negative_prompt_embeds"], negative, atol=1e-5)


def test_long_prompt_is_split_at_commas(tiny_pipeline: Any) -> None:
    """With a tokenizer that marks the ends of words, as CLIP's does."""
    studio = sdxl_studio(tiny_pipeline())
    words = [*LONG.replace(",", "").split(), ","]
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges = []
    for word in words:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for index, letter in enumerate(letters):
            start = "".join(letters[:index])
            if start:
                merges.append((start, letter))
            for piece in (letter, start + letter):
                vocabulary.setdefault(piece, len(vocabulary))
    for suffix, cls in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=12)
        setattr(studio.pipe, f"tokenizer{suffix}", tokenizer)
        config = getattr(studio.pipe, f"text_encoder{suffix}").config.to_dict()
        encoder = cls(CLIPTextConfig(**{**config, "vocab_size": len(vocabulary)}))
        setattr(studio.pipe, f"text_encoder{suffix}", encoder.eval())
    encoded = embeddings(studio, LONG)["prompt_embeds"]
    parts = ["portrait of a person, red hat,", "blue background, film noir, smiling,", "green hat"]
    expected = torch.cat([encode(studio, part)[0] for part in parts], dim=1)
    assert torch.allclose(encoded, expected, atol=1e-5)


def test_negative_prompt_of_pulid_is_cut(studio: Studio) -> None:
    preset = studio.preset.with_defaults(negative_prompt=NEGATIVE_PROMPT)
    request = preset.resolve(GenerationRequest("portrait"))
    assert encode_prompts(studio.pipe, request, preset)["negative_prompt"] == NEGATIVE_PROMPT
    request = preset.resolve(GenerationRequest("(portrait:1.2)"))
    encoded = encode_prompts(studio.pipe, request, preset)
    cut = encode(studio, NEGATIVE_PROMPT)[0]
    assert torch.allclose(encoded["negative_prompt_embeds"], cut, atol=1e-5)


def test_images_of_weighted_prompts(studio: Studio, tmp_path: Path) -> None:
    """Alone and in batches, with a person, and in image-to-image and inpainting."""
    anna.save(tmp_path / "anna.safetensors")
    Image.new("RGB", (SIDE, SIDE), "teal").save(tmp_path / "room.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, : SIDE // 2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    person = Person(identity=tmp_path / "anna.safetensors", scale=1.0)
    box = (0.0, 0.0, 0.5, 1.0)
    left, right = (
        Person(identity=tmp_path / "anna.safetensors", box=box),
        Person(identity=tmp_path / "anna.safetensors", box=(0.5, 0.0, 1.0, 1.0), scale=0.5),
    )
    inputs: list[dict[str, Any]] = [
        {},
        {"people": [person]},
        {"people": [left, right]},
        {"init_image": InitImage(tmp_path / "room.png", strength=0.75)},
        {"init_image": InitImage(tmp_path / "room.png", strength=0.75, mask=tmp_path / "mask.png")},
    ]
    for options in inputs:
        plain = GenerationRequest("portrait, red hat", seed=4, num_images=2, **options)
        texts = {"prompt": f"{LONG}, (red hat:1.8)", "negative_prompt": "(blue:1.2)"}
        weighted = plain.model_copy(update=texts)
        images = [studio.generate(request).images[1] for request in (plain, weighted)]
        result = studio.generate(weighted, batch_size=2)
        assert result.requests[1].prompt == texts["prompt"]
        assert np.abs(pixels(images[1]) - pixels(result.images[1])).max() <= 2
        assert np.abs(pixels(images[0]) - pixels(images[1])).max() > 2


def test_weighted_image_is_that_of_diffusers_with_the_embeddings(studio: Studio) -> None:
    prompt = "portrait, (red hat:1.5)"
    image = pixels(studio.generate(prompt, seed=5).images[0])
    assert np.array_equal(image, run_diffusers(studio, **embeddings(studio, prompt)))


def test_weights_are_refused_where_nothing_reads_them() -> None:
    request = GenerationRequest("a man, (smile:1.3), [old] (actor)", negative_prompt="((hat))")
    message = (
        r"^prompt has weights, \(smile:1\.3\), \[old\], which FLUX\.1 does not support; leave them "
        r"out, or write \\\( and \\\[ for brackets\.$"
    )
    with pytest.raises(OptionError, match=message):
        flux().resolve(request)
    with pytest.raises(OptionError, match=r"negative_prompt has weights, \(\(hat\)\)"):
        flux().resolve(request.model_copy(update={"prompt": "a man", "true_cfg_scale": 2.0}))
    with pytest.raises(OptionError, match="which photomaker does not support"):
        with_method(sdxl(), "photomaker").resolve(request)
    sdxl().resolve(request)
    flux().resolve(GenerationRequest(r"a man (actor), \[old\]"))


def test_flux_reads_escaped_brackets() -> None:
    """As brackets, which the small tokenizer does not know."""
    request = flux().resolve(GenerationRequest(r"portrait \(of a person\)"))
    assert encode_prompts(tiny_pipe(), request, flux())["prompt"] == "portrait of a person"


@pytest.mark.parametrize("method", ["pulid", "faceid", "instantid"])
def test_weights_in_the_miniature(method: str) -> None:
    """With every method that reads weights; the longest prompt it reads has 46 words."""
    preset = mini() if method == "pulid" else with_method(mini(), method)
    if not Path(str(preset.models.adapter)).exists():
        pytest.skip("the miniature's adapter is not built")
    studio = load(preset.with_defaults(num_inference_steps=2), device="cpu")
    person = Path(__file__).parents[2] / "examples" / "anna.png"
    words = ", ".join(["smiling", "film noir", "red background"] * 9)
    images = [
        pixels(studio.generate(prompt, studio.identify(person), seed=3).images[0])
        for prompt in ("portrait, smiling", "portrait, (smiling:1.5)!", f"portrait, {words}")
    ]
    assert min(np.abs(images[0] - image).mean() for image in images[1:]) > 0.5


def test_photomaker_reads_no_weights() -> None:
    assert [with_method(sdxl(), name).reads_weights for name in ("instantid", "photomaker-v2")] == [
        True,
        False,
    ]
