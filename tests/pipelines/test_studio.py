"""The whole story on tiny random weights laid out as the miniature's are: load, identify, generate, and
what goes wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openpulid import load
from openpulid.errors import (
    FaceError,
    IdentityError,
    ImageError,
    OptionError,
    PromptError,
    WeightsError,
)
from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.faces.mini_recognition import ResNetRecognition
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import save_module
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.presets import (
    flux,
    mini,
    mini_lightning,
    options_of,
    with_method,
    with_options,
)
from openpulid.pipelines.studio import GenerationResult, Studio, load_reader


@pytest.fixture(scope="module")
def folder(tiny_pipeline, tmp_path_factory) -> Path:
    """Weights on disk. The finder takes everything for a face, or nothing: that is up to the test."""
    folder = tmp_path_factory.mktemp("weights")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "pipeline")
    tiny_pipeline(1).unet.save_pretrained(folder / "lightning")
    torch.manual_seed(0)
    tower = VisionEncoder(
        img_size=32, patch_size=8, embed_dim=8, depth=5, num_heads=2, num_classes=4, ref_grid=None
    )
    save_module(MiniFaceDetector((8, 8, 8)), folder / "detector.safetensors")
    save_module(
        ResNetRecognition(8, (8, 8, 8), (1, 1, 1), dim=12),
        folder / "recognition-encoder.safetensors",
    )
    save_module(tower, folder / "vision-encoder.safetensors")
    adapter = PuLID.for_unet(pipe.unet, IDEncoder(16, 64, vit_dim=8, hidden_dim=16))
    for layer in adapter.id_adapter_attn_layers.values():
        torch.nn.init.normal_(layer.id_to_v.weight)
    adapter.save(folder / "pulid-stage3.safetensors")
    return folder


@pytest.fixture(scope="module")
def studio(folder) -> Studio:
    studio = load(replace(mini(folder), steps=3, scale=1.0), device="cpu")
    finder = studio.features.finder
    with torch.no_grad():  # whatever it sees is a face
        finder.score[-1].weight.zero_(), finder.score[-1].bias.fill_(100)
        finder.parts.weight.zero_(), finder.parts.bias.zero_()
        finder.parts.bias[4:8] = 100
    return studio


@pytest.fixture(scope="module")
def anna(studio) -> Identity:
    return studio.identify(picture(0))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    )


def pixels(result: GenerationResult) -> list[np.ndarray]:
    return [np.asarray(image).astype(int) for image in result.images]


def test_identity_changes_the_image(studio, anna) -> None:
    [without] = pixels(studio.generate("portrait, film noir", seed=3))
    [someone] = pixels(studio.generate("portrait, film noir", seed=3, identity=anna))
    assert without.shape == (16, 16, 3) and np.abs(without - someone).max() > 3
    [nobody] = pixels(studio.generate("portrait, film noir", seed=3, identity=anna, scale=0))
    assert np.array_equal(nobody, without)
    assert not any(
        part._forward_hooks or part._forward_pre_hooks for part in studio.pipe.unet.modules()
    )


def test_the_seed_is_the_image(studio, anna) -> None:
    four = studio.generate("portrait", anna, seed=5, num_images=4)
    assert four.seeds == [5, 6, 7, 8]
    for seed, image in zip(four.seeds, pixels(four), strict=True):
        assert np.array_equal(pixels(studio.generate("portrait", anna, seed=seed))[0], image)
    together = pixels(studio.generate("portrait", anna, seed=5, num_images=4, batch=3))
    assert max(np.abs(a - b).max() for a, b in zip(together, pixels(four), strict=True)) <= 1
    assert np.abs(together[0] - together[1]).max() > 3


def test_threads_that_share_a_studio_do_not_mix(studio, anna) -> None:
    """Nobody in one thread and Anna in the other, each with a guidance of its own."""
    asked = [{"identity": anna, "guidance": 1.0}, {"identity": None, "guidance": 3.0}] * 2
    alone = [pixels(studio.generate("portrait", seed=2, steps=12, **one)) for one in asked]
    with ThreadPoolExecutor(4) as threads:
        made = list(
            threads.map(
                lambda one: pixels(studio.generate("portrait", seed=2, steps=12, **one)), asked
            )
        )
    assert all(np.array_equal(a, b) for a, b in zip(alone, made, strict=True))
    assert not np.array_equal(alone[0], alone[1])


def test_options_reach_the_sampler(studio, anna) -> None:
    def image(**options: object) -> np.ndarray:
        return pixels(studio.generate("portrait", anna, seed=1, **options))[0]

    usual = image()
    for options in (
        {"steps": 4},
        {"guidance": 1.0},
        {"negative": "red hat"},
        {"scale": 0.3},
        {"start": 0.5},
        {"num_zero": 9},
    ):
        assert not np.array_equal(image(**options), usual), options


def test_words_it_does_not_know(studio) -> None:
    with pytest.raises(
        PromptError, match=r"'Portait' \(near: portrait\) and 'zebra'; use its own words"
    ) as error:
        studio.generate("Portait of a zebra, red hat")
    assert error.value.words == ("Portait", "zebra")
    with pytest.raises(PromptError, match=r"does not know '!'; use"):
        studio.generate("portrait!")
    with pytest.raises(PromptError, match="'zebra'"):
        studio.generate("portrait", negative="zebra")
    with pytest.raises(PromptError, match="22 tokens and the model reads 12"):
        studio.generate("red " * 20)


@pytest.mark.parametrize(
    "options",
    [{"num_images": 0}, {"steps": 0}, {"seed": -1}, {"batch": 0}, {"num_zero": -1}, {"end": 2}],
)
def test_numbers_outside_their_range(studio, anna, options) -> None:
    with pytest.raises(OptionError):
        studio.generate("portrait", anna, **options)


@pytest.mark.parametrize("name", ["start_step", "true_cfg", "timestep_to_start_cfg", "text_tokens"])
def test_what_would_change_nothing_is_refused(studio, anna, name: str) -> None:
    with pytest.raises(OptionError, match=rf"nothing would change by {name}; leave that out\.$"):
        studio.generate("portrait", anna, **{name: 2})


def test_what_acts_is_each_methods_own() -> None:
    shared = {"steps", "guidance", "negative", "size", "scale", "start", "end"}
    assert options_of(mini()).keys() - shared == {"projection", "num_zero"}
    assert options_of(with_method(mini(), "faceid")).keys() == shared
    theirs = {"true_cfg", "text_tokens", "start_step", "timestep_to_start_cfg"}
    assert options_of(flux()).keys() - shared == theirs
    with pytest.raises(
        OptionError,
        match="with mini, faceid nothing would change by projection and num_zero; leave",
    ):
        with_options(with_method(mini(), "faceid"), projection="none", num_zero=0, scale=0.5)


def test_a_result_says_what_it_was_made_with(studio, anna) -> None:
    result = studio.generate("portrait", anna, steps=2, num_zero=3)
    assert result.preset == replace(studio.preset, steps=2, num_zero=3)
    assert pixels(
        Studio(studio.pipe, None, studio.adapter, result.preset).generate("portrait", anna)
    )[0].tolist() == (pixels(result)[0].tolist())


def test_identify_from_files(studio, anna, tmp_path) -> None:
    picture(0).save(tmp_path / "anna.png")
    again = studio.identify(tmp_path / "anna.png")
    assert torch.equal(again.id_cond, anna.id_cond) and again.models == anna.models
    assert studio.identify([str(tmp_path / "anna.png"), picture(1)]).photos == 2
    with pytest.raises(ImageError, match=r"nobody\.png"):
        studio.identify(tmp_path / "nobody.png")
    with pytest.raises(OptionError, match="at least one"):
        studio.identify([])


def test_a_picture_without_a_face_it_knows(folder, tmp_path) -> None:
    studio = load(mini(folder))
    with torch.no_grad():
        studio.features.finder.score[-1].bias.fill_(-100)
    picture(0).save(tmp_path / "photo.jpg")
    with pytest.raises(
        FaceError,
        match=r"photo\.jpg: no face was found in its 96 x 96 pixels \(one look at 96 pixels\); the preset mini knows only",
    ) as said:
        studio.identify(tmp_path / "photo.jpg")
    error = said.value
    assert (error.source, error.size, error.search_description) == (
        str(tmp_path / "photo.jpg"),
        (96, 96),
        "one look at 96 pixels",
    )


def test_an_identity_of_other_models_is_refused(studio, anna) -> None:
    foreign = Identity(anna.id_cond, anna.hidden, {**anna.models, "vision": "0" * 64})
    mask = torch.ones(2, 2)
    for people in (
        foreign,
        [(foreign, mask)],
        [(anna, mask), (foreign, 1 - mask)],
        [foreign],
        [[(anna, mask), (foreign, mask)]],
    ):
        with pytest.raises(IdentityError, match="another vision"):
            studio.generate("portrait", people)


def test_the_students_preset(folder) -> None:
    studio = load(mini_lightning(folder), device="cpu")
    assert studio.pipe.scheduler.config.timestep_spacing == "trailing"
    base = load(str(folder), device="cpu")
    theirs, ours = (s.pipe.unet.conv_in.weight for s in (base, studio))
    assert not torch.equal(theirs, ours)
    assert studio.generate("portrait").images[0].size == (16, 16)


def test_what_cannot_be_loaded(folder, tmp_path) -> None:
    with pytest.raises(OptionError, match="neither a preset"):
        load("no-such-preset")
    with pytest.raises(WeightsError, match="adapter"):
        load(replace(mini(folder), adapter=tmp_path / "none.safetensors"))
    with pytest.raises(WeightsError, match="no pipeline"):
        load(replace(mini(folder), pipeline=tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load(replace(mini(folder), pipeline=tmp_path))


def test_faces_are_read_without_the_rest(folder, anna, tmp_path) -> None:
    alone = load_reader(
        replace(mini(folder), pipeline=tmp_path / "none", adapter=tmp_path / "none.safetensors"),
        "cpu",
    )
    assert alone.features.models == anna.models
    with pytest.raises(OptionError, match="only reads faces; load a preset"):
        alone.generate("portrait")


def test_without_its_parts(studio, anna) -> None:
    bare = Studio(studio.pipe, None, None, studio.preset)
    bare.generate("portrait")
    with pytest.raises(OptionError, match="without an adapter"):
        bare.generate("portrait", anna)
    with pytest.raises(OptionError, match="reads faces"):
        bare.identify(picture(0))
