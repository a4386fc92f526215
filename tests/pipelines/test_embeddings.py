"""Textual inversion, next to diffusers' own `load_textual_inversion`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from openpulid.errors import OptionError, PromptError, WeightsError
from openpulid.pipelines.embeddings import open_embedding
from openpulid.pipelines.presets import flux, mini, sdxl
from openpulid.pipelines.prompts import check_words
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Embedding, InitImage
from openpulid.pipelines.studio import Studio
from tests.support.studios import (
    SIDE,
    assert_same_state,
    components_state,
    flux_studio,
    pixels,
    run_diffusers,
    sdxl_studio,
)
from tests.support.tiny_flux import tiny_pipe

WIDTHS = {"sdxl": {"clip_l": 32, "clip_g": 32}, "flux": {"clip_l": 20, "t5": 24}}


def tensors(family: str, count: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, width, generator=generator)
        for name, width in WIDTHS[family].items()
    }


@pytest.fixture(scope="module")
def studios(tiny_pipeline: Any) -> dict[str, Studio]:
    return {"sdxl": sdxl_studio(tiny_pipeline()), "flux": flux_studio(tiny_pipe())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    for family in WIDTHS:
        save_file(tensors(family), folder / f"{family}_style.safetensors")
        torch.save(tensors(family), folder / f"{family}_style.pt")
        save_file(tensors(family, 1, seed=3), folder / f"{family}_one.safetensors")
    return folder


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_words_are_those_of_diffusers(
    family: str, studios: dict[str, Studio], folder: Path
) -> None:
    studio = studios[family]
    pipe = studio.pipe
    plain = pixels(studio.generate("portrait", seed=5).images[0])
    before = components_state(pipe)
    vocabularies = [pipe.tokenizer.get_vocab(), pipe.tokenizer_2.get_vocab()]
    prompt = f"portrait of {family}_style <s0>"
    embeddings = [
        Embedding(folder / f"{family}_style.safetensors"),
        Embedding(folder / f"{family}_one.safetensors", "<s0>"),
    ]
    request = GenerationRequest(prompt, seed=5, embeddings=embeddings)
    image = pixels(studio.generate(request).images[0])

    assert_same_state(components_state(pipe), before)
    assert [pipe.tokenizer.get_vocab(), pipe.tokenizer_2.get_vocab()] == vocabularies
    assert np.array_equal(pixels(studio.generate("portrait", seed=5).images[0]), plain)
    other = type(pipe)(**copy.deepcopy(pipe.components))
    other.set_progress_bar_config(disable=True)
    for suffix, name in (("", "clip_l"), ("_2", "clip_g" if family == "sdxl" else "t5")):
        for token, file in ((f"{family}_style", tensors(family)), ("<s0>", tensors(family, 1, 3))):
            other.load_textual_inversion(
                file[name],
                token=token,
                tokenizer=getattr(other, f"tokenizer{suffix}"),
                text_encoder=getattr(other, f"text_encoder{suffix}"),
            )
    own, studio.pipe = pipe, other
    try:
        expected = run_diffusers(studio, prompt=prompt)
    finally:
        studio.pipe = own
    assert np.array_equal(image, expected)
    assert np.abs(image - plain).max() > 2


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_pytorch_file_is_the_same(family: str, studios: dict[str, Studio], folder: Path) -> None:
    images = []
    for suffix in ("pt", "safetensors"):
        embedding = Embedding(folder / f"{family}_style.{suffix}")
        request = GenerationRequest(f"{family}_style", embeddings=[embedding])
        images.append(pixels(studios[family].generate(request).images[0]))
    assert np.array_equal(*images)


def test_word_with_a_weight(studios: dict[str, Studio], folder: Path) -> None:
    """A word of several vectors can have a weight."""
    embedding = Embedding(folder / "sdxl_style.safetensors")
    images = []
    for prompt in ("portrait, sdxl_style", "portrait, (sdxl_style:1.5)"):
        request = GenerationRequest(prompt, embeddings=[embedding])
        images.append(pixels(studios["sdxl"].generate(request).images[0]))
    assert np.abs(images[0] - images[1]).max() > 2


def test_unused_word_is_noted(
    studios: dict[str, Studio], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedding = Embedding(folder / "sdxl_one.safetensors", "<s0>")
    studio = studios["sdxl"]
    studio.generate(GenerationRequest("portrait", embeddings=[embedding]))
    message = f"{embedding.file} has no effect; write its word, <s0>, in a prompt"
    assert [record.getMessage() for record in caplog.records] == [message]
    caplog.clear()
    studio.generate(GenerationRequest("hat", negative_prompt="<s0>", embeddings=[embedding]))
    assert not caplog.records


def test_word_of_the_vocabulary_is_refused(studios: dict[str, Studio], folder: Path) -> None:
    studio = studios["sdxl"]
    before = components_state(studio.pipe)
    embedding = Embedding(folder / "sdxl_one.safetensors", "noir")
    with pytest.raises(OptionError, match="'noir' is a word of the model or of another embedding"):
        studio.generate(GenerationRequest("noir", embeddings=[embedding]))
    twice = [Embedding(folder / "sdxl_one.safetensors", "<s0>")] * 2
    with pytest.raises(OptionError, match="'<s0>' is a word of the model or of another"):
        studio.generate(GenerationRequest("<s0>", embeddings=twice))
    assert_same_state(components_state(studio.pipe), before)


def test_embedding_of_another_width_is_refused(studios: dict[str, Studio], tmp_path: Path) -> None:
    save_file(
        {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, tmp_path / "x.safetensors"
    )
    studio = studios["sdxl"]
    before = components_state(studio.pipe)
    request = GenerationRequest("x1", embeddings=[Embedding(tmp_path / "x.safetensors", "x1")])
    with pytest.raises(WeightsError, match=r"its clip_l has width 768, the text encoder 32"):
        studio.generate(request)
    assert_same_state(components_state(studio.pipe), before)


def test_embedding_for_another_base_is_refused_before_loading(folder: Path) -> None:
    own = {"sdxl": (sdxl(), mini()), "flux": (flux(),)}
    for family, presets in own.items():
        files = open_embedding(Embedding(folder / f"{family}_style.safetensors"))
        for preset in presets:
            files.check(preset.models)
        other = flux() if family == "sdxl" else sdxl()
        with pytest.raises(WeightsError, match=r"is an embedding with clip_. and|t5 and"):
            files.check(other.models)


def test_image_to_image(studios: dict[str, Studio], folder: Path, tmp_path: Path) -> None:
    """Not in diffusers' pipelines for FLUX."""
    Image.new("RGB", (SIDE, SIDE), "teal").save(tmp_path / "room.png")
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "mask.png")
    room, masked = (
        InitImage(tmp_path / "room.png", mask=mask) for mask in (None, tmp_path / "mask.png")
    )
    for init in (room, masked):
        embedding = Embedding(folder / "sdxl_style.safetensors")
        images = [
            studios["sdxl"].generate(
                GenerationRequest(prompt, init_image=init, embeddings=[embedding])
            )
            for prompt in ("portrait", "portrait sdxl_style")
        ]
        difference = np.abs(pixels(images[0].images[0]) - pixels(images[1].images[0]))
        assert difference.max() > 2
    embedding = Embedding(folder / "flux_style.safetensors")
    request = GenerationRequest("flux_style", init_image=room, embeddings=[embedding])
    message = "on FLUX, embeddings cannot be used with init_image; leave one out"
    with pytest.raises(OptionError, match=message):
        studios["flux"].generate(request)
    request = GenerationRequest("flux_style", embeddings=[embedding])
    with pytest.raises(OptionError, match="embeddings cannot be used with memory 16gb; use full"):
        flux().with_models(memory="16gb").resolve(request)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"style\.pt does not exist; name the file of an embedding"),
        (lambda path: path.write_bytes(b"x" * 100), "is damaged or holds more than weights"),
        (
            lambda path: torch.save({"emb_params": torch.zeros(1, 768)}, path),
            "it is one for Stable Diffusion 1 or 2",
        ),
        (lambda path: torch.save({"unet.a.lora_A.weight": torch.zeros(1)}, path), "it is a LoRA"),
        (
            lambda path: torch.save({"clip_l": torch.zeros(8), "clip_g": torch.zeros(8)}, path),
            "its tensors are not matrices",
        ),
    ],
)
def test_unusable_files_are_named(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "style.pt")
    with pytest.raises(WeightsError, match=message):
        open_embedding(Embedding(tmp_path / "style.pt"))


def test_miniature_knows_the_word(tmp_path: Path) -> None:
    """Its vocabulary is closed, and an unknown word is refused before it is loaded."""
    embedding = Embedding(tmp_path / "<noir style>.safetensors")
    request = GenerationRequest("portrait, <noir style>!", embeddings=[embedding])
    check_words(mini(), request)
    with pytest.raises(PromptError, match="'style'"):
        check_words(mini(), request.model_copy(update={"embeddings": ()}))


def test_image_names_its_embeddings(
    studios: dict[str, Studio], folder: Path, tmp_path: Path
) -> None:
    studio = studios["sdxl"]
    path = folder / "sdxl_style.safetensors"
    request = GenerationRequest(
        "sdxl_style", embeddings=[Embedding(path)], model=studio.preset.selection
    )
    result = studio.generate(request)
    (saved,) = result.save(tmp_path)
    stored = Provenance.read(saved)
    assert stored.required_files() == {"embeddings.0.file": "sdxl_style.safetensors"}
    again = stored.restore({"embeddings.0.file": path})
    assert np.array_equal(pixels(studio.generate(again).images[0]), pixels(result.images[0]))


def test_word_inside_another_word_is_refused() -> None:
    """The tokenizer would split the other word."""
    for prompt, negative in (("portrait, t", None), ("noir", "a portrait")):
        with pytest.raises(OptionError, match="the word 't' of an embedding is part of 'portrait'"):
            GenerationRequest(prompt, negative_prompt=negative, embeddings=[Embedding("t.bin")])
    for token in ("<t>", "t"):
        GenerationRequest("noir, t <t>", embeddings=[Embedding("style.bin", token)])
