"""FastComposer with several people, by their words: requests, the command line, mistakes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from openpulid.cli import main as cli
from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.prompt_adapter import PromptAdapter
from openpulid.methods.prompt_fusion import count_class_words
from openpulid.methods.registry import METHODS, find_method
from openpulid.pipelines.loading import load
from openpulid.pipelines.model_set import WORD_METHODS
from openpulid.pipelines.presets import Preset, flux, mini, sdxl
from openpulid.pipelines.prompts import check_words
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import FaceRefinement, GenerationRequest
from openpulid.pipelines.request_fields import RequestError
from openpulid.pipelines.request_inputs import Person
from openpulid.pipelines.selection import with_method
from openpulid.pipelines.studio import Studio
from tests.support.composer_files import TWO_PEOPLE, draw_person, link_miniature

STEPS = 4
ANNA, BEN = Person(identity="anna.safetensors"), Person(identity="ben.safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_miniature(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def preset(weights: Path) -> Preset:
    preset = with_method(mini(weights), "fastcomposer")
    return preset.with_defaults(num_inference_steps=STEPS, start=0.0)


@pytest.fixture(scope="module")
def studio(preset: Preset) -> Studio:
    return load(preset, "cpu")


@pytest.fixture(scope="module")
def people(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> list[Identity]:
    """Anna and Ben; their files and images are in the working directory of a test."""
    return [studio.identify(draw_person(seed)) for seed in (3, 4)]


@pytest.fixture(autouse=True)
def files(people: list[Identity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed, identity in zip(("anna", "ben"), (3, 4), people, strict=True):
        identity.save(f"{name}.safetensors")
        draw_person(seed).save(f"{name}.png")


def request(*people: Person, prompt: str = TWO_PEOPLE, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt, people=people, seed=2, **fields)


def pixels(studio: Studio, request: GenerationRequest) -> np.ndarray:
    return np.asarray(studio.generate(request).images[0]).astype(int)


# --- images


def test_request_gives_the_image_of_the_adapter(studio: Studio, people: list[Identity]) -> None:
    anna, ben = people
    with studio.adapter.use([(anna, None), (ben, None)], start=0.0, pipe=studio.pipe):
        expected = studio.pipe(
            TWO_PEOPLE,
            width=96,
            height=96,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(2),
        ).images[0]
    shown = studio.generate(request(ANNA, BEN)).images[0]
    assert shown.tobytes() == expected.tobytes()
    of_objects = studio.generate(TWO_PEOPLE, [(anna, None), (ben, None)], seed=2).images[0]
    assert of_objects.tobytes() == expected.tobytes()
    of_images = studio.generate(request(Person(images=["anna.png"]), Person(images=["ben.png"])))
    assert of_images.images[0].tobytes() == expected.tobytes()


def test_each_person_goes_to_their_word(studio: Studio) -> None:
    both = pixels(studio, request(ANNA, BEN))
    for other in (
        request(BEN, ANNA),
        request(ANNA, ANNA),
        request(ANNA),
        request(BEN),
        request(),
    ):
        assert np.abs(pixels(studio, other) - both).max() > 2
    without = pixels(studio, request())
    one_scale = [person.model_copy(update={"scale": 0.0}) for person in (ANNA, BEN)]
    assert np.array_equal(pixels(studio, request(*one_scale)), without)


def test_batch_equals_single_images(studio: Studio) -> None:
    rows = [request(ANNA, BEN), request(BEN, ANNA, prompt="photo of a person, a person")]
    together = studio.generate_batch(rows)
    for row, result in zip(rows, together, strict=True):
        image = np.asarray(result.images[0]).astype(int)
        assert np.abs(image - pixels(studio, row)).max() <= 2


def test_image_starts_from_another_one(studio: Studio) -> None:
    """The pipeline for initial images names the same people."""
    init = {"image": "anna.png", "strength": 0.8}
    both = pixels(studio, request(ANNA, BEN, init_image=init))
    assert np.abs(pixels(studio, request(BEN, ANNA, init_image=init)) - both).max() > 2


# --- mistakes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            request(ANNA, BEN, prompt="portrait of a person"),
            "prompt has 1 word for 2 people; write one word for each of them, such as",
        ),
        (request(ANNA, BEN, prompt="portrait, photo"), "prompt has 0 words for 2 people; write"),
        (
            request(ANNA, BEN.model_copy(update={"box": (0, 0, 0.5, 1)})),
            "people.1.box is only supported by PuLID and InfiniteYou, not by fastcomposer; leave",
        ),
        (
            request(ANNA.model_copy(update={"mask": "anna.png"}), BEN),
            "people.0.mask is only supported by PuLID and InfiniteYou, not by fastcomposer; leave",
        ),
        (
            request(ANNA, BEN.model_copy(update={"scale": 0.5})),
            "people.1.scale 0.5 is not that of the first person, 1; use one for all, because "
            "fastcomposer has no scale for each person.",
        ),
        (
            request(ANNA, BEN, refine_faces=FaceRefinement()),
            "refine_faces needs a region for each person, and fastcomposer has no regions; leave",
        ),
    ],
)
def test_mistake_is_one_sentence_before_models_are_loaded(
    preset: Preset, changed: GenerationRequest, message: str
) -> None:
    with pytest.raises(RequestError) as error:
        check_words(preset, preset.resolve(changed))
    assert str(error.value).startswith(message)


def test_mistake_is_reported_before_the_first_step(studio: Studio, people: list[Identity]) -> None:
    steps: list[int] = []
    two = [(identity, None) for identity in people]
    options: dict[str, Any] = {"callback": lambda step, total, preview: steps.append(step)}
    with pytest.raises(OptionError, match="prompt has 1 word for 2 people"):
        studio.generate("portrait of a person", two, **options)
    with pytest.raises(OptionError, match="prompt has 2 words for 3 people"):
        studio.generate(request(ANNA, BEN, ANNA), **options)
    with pytest.raises(OptionError, match="prompt has 1 word for 2 people"):
        studio.generate_batch([request(ANNA, BEN, prompt="photo of a person")], **options)
    with pytest.raises(OptionError, match="FastComposer has no masks"):
        studio.generate(TWO_PEOPLE, [(people[0], torch.ones(8, 8)), two[1]], **options)
    with pytest.raises(OptionError, match="refine_faces needs a region for each person"):
        studio.generate(TWO_PEOPLE, two, refine_faces=True, **options)
    assert not steps


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mini(), "each of several people needs people.0.mask or people.0.box, which say where in"),
        (with_method(flux(), "infiniteyou"), "each of several people needs people.0.mask"),
        (
            with_method(mini(), "faceid"),
            "faceid shows one person in an image; leave people.1.identity out, or use PuLID, "
            "InfiniteYou or FastComposer.",
        ),
        (with_method(mini(), "photomaker"), "photomaker shows one person in an image; leave"),
    ],
)
def test_other_methods_need_regions_or_show_one_person(other: Preset, message: str) -> None:
    with pytest.raises(RequestError) as error:
        other.resolve(request(ANNA, BEN))
    assert str(error.value).startswith(message)


def test_words_of_sdxl_are_checked_if_its_tokenizer_is_installed(
    weights: Path, tmp_path: Path
) -> None:
    """Every word is known there, so only words for people are counted."""
    save_file({"x": torch.ones(1)}, tmp_path / "own.safetensors")
    preset = with_method(sdxl(weights / "pipeline"), "fastcomposer", tmp_path / "own.safetensors")
    check_words(preset, request(ANNA, BEN, prompt="zebra person person"))
    check_words(preset, request(ANNA, prompt="zebra"))
    with pytest.raises(RequestError, match="prompt has 1 word for 2 people"):
        check_words(preset, request(ANNA, BEN, prompt="zebra person"))
    other = with_method(sdxl(tmp_path), "fastcomposer", tmp_path / "own.safetensors")
    check_words(other, request(ANNA, BEN, prompt="zebra person"))  # the studio will refuse it


def test_words_beyond_the_end_of_the_prompt_do_not_count(studio: Studio) -> None:
    tokenizer = studio.pipe.tokenizer_2
    limit = tokenizer.model_max_length
    assert count_class_words("red " * (limit - 4) + "person person", tokenizer) == 2
    assert count_class_words("red " * (limit - 3) + "person person", tokenizer) == 1


def test_methods_by_words_are_those_whose_class_shows_several() -> None:
    classes = {name: find_method(name) for name in METHODS}
    several = [
        name
        for name, method in classes.items()
        if issubclass(method, PromptAdapter) and method.shows_several
    ]
    assert sorted(several) == sorted(WORD_METHODS)


# --- command line


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run `pulid generate`, and return its exit code and what it prints on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pulid", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return int(stop.value.code or 0), capsys.readouterr().err


def test_command_line(
    studio: Studio, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ("--preset", weights)
    options = ("--method", "fastcomposer", "--start", 0, "--steps", STEPS, "--seed", 2, "-o", "out")
    two = ("--id", "anna.png", "--id", "ben.safetensors")
    code, err = run(capsys, TWO_PEOPLE, *two, *models, *options, "--name", "{seed}")
    assert code == 0, err
    image = tmp_path / "out" / "2.png"
    expected = studio.generate(request(ANNA, BEN)).images[0]
    assert Image.open(image).tobytes() == expected.tobytes()
    stored = Provenance.read(image).request
    assert stored.people == (Person(images=["anna.png"]), Person(identity="ben.safetensors"))

    again = ("--from", image, *models, "-o", "again", "--name", "{seed}")
    code, err = run(capsys, *again, *two)
    assert code == 0, err
    assert Image.open("again/2.png").tobytes() == expected.tobytes()
    code, err = run(capsys, *again, "--id", "ben.png", "--id", "ben.safetensors")
    assert code == 2 and "ben.png is not the file" in err

    for words, message in (
        (("portrait of a person", *two), "PROMPT has 1 word for 2 people; write one word for each"),
        ((TWO_PEOPLE, *two, "--mask", "0,0,0.5,1"), "--mask is only supported by PuLID and"),
        ((TWO_PEOPLE, *two, "--scale", 1, "--scale", 0.5), "--scale 0.5 is not that of the first"),
        ((TWO_PEOPLE, *two, "--scale", 1, "--scale", 1, "--scale", 1), "3 --scale and 2 people"),
        ((TWO_PEOPLE, "--mask", "0,0,0.5,1", "--mask", "ben.png"), "--mask requires a person"),
    ):
        code, err = run(capsys, *words, *models, *options)
        assert code == 2 and err.startswith(f"pulid: {message}"), err
        assert len(err.splitlines()) == 1
