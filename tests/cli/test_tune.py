"""`pulid tune`, and `pulid generate` with its files, on the miniature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openpulid.errors import OutputError
from openpulid.io.checkpoints import read_metadata
from openpulid.io.metadata import read_metadata as read_image_metadata
from openpulid.methods.tuned import TunedLora
from openpulid.training.tuning.task import TuningTask
from openpulid.world.gallery import render_portrait
from tests.cli.conftest import Run

PROMPT = "portrait of a person, film noir"
SHORT = ("--steps", 2, "--num", 1, "--seed", 3)


@pytest.fixture(scope="module")
def anna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("anna") / "anna.png"
    render_portrait(1_000_007, 96).save(path)
    return path


def only_image(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.png")
    return np.array(Image.open(path))


@pytest.mark.parametrize("method", ["lora", "custom-diffusion"])
def test_file_of_a_person_is_used_without_a_reference_image(
    pulid: Run, anna: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "files" / "anna.safetensors"
    options = ("--steps", 4, "--batch", 1, "--class-images", 0, "--lr", 0.02)
    done = pulid("tune", method, anna, "-o", out, *options)
    assert done.code == 0, done.err
    assert list(out.parent.iterdir()) == [out]  # no checkpoints are left
    facts = read_metadata(out)
    assert (facts["method"], facts["class_word"], facts["images"]) == (method, "person", "1")
    folder = tmp_path / method
    person = ("--method", method, "--adapter", out)
    done = pulid("generate", PROMPT, *person, *SHORT, "-o", folder)
    assert done.code == 0 and "no --id" not in done.err, done.err
    done = pulid("generate", PROMPT, *SHORT, "-o", tmp_path / "base")
    assert done.code == 0, done.err
    assert not np.array_equal(only_image(folder), only_image(tmp_path / "base"))
    request = json.loads(read_image_metadata(next(folder.glob("*.png"))))["request"]
    assert request["prompt"] == PROMPT  # the word for the person is not a part of it
    assert request["model"]["method"] == method


MISTAKES = {
    "a wrong suffix": (("lora", "{anna}", "-o", "anna.ckpt"), "must name a file such as"),
    "an unknown method": (("hypernet", "{anna}", "-o", "{out}"), "no tuning method 'hypernet'"),
    "a missing image": (("lora", "none.png", "-o", "{out}"), "none.png"),
    "a base that is not SDXL": (
        ("lora", "{anna}", "-o", "{out}", "--preset", "flux"),
        "tunes SDXL, and preset 'flux' is not one",
    ),
    "a rank without a LoRA": (
        ("textual-inversion", "{anna}", "-o", "{out}", "--rank", "8"),
        "--rank has no effect with textual-inversion",
    ),
    "class images without an effect": (
        ("textual-inversion", "{anna}", "-o", "{out}", "--class-images", "8"),
        "--class-images has no effect with textual-inversion",
    ),
    "vectors without a word": (
        ("lora", "{anna}", "-o", "{out}", "--vectors", "8"),
        "--vectors has no effect with lora",
    ),
    "a file that exists": (("lora", "{anna}", "-o", "{anna}.safetensors"), "--overwrite"),
    "weights that are missing": (
        ("lora", "{anna}", "-o", "{out}", "--preset", "sdxl"),
        "pulid weights get",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(pulid: Run, anna: Path, tmp_path: Path, name: str) -> None:
    arguments, message = MISTAKES[name]
    anna.with_name("anna.png.safetensors").write_text("mine")
    places = {"anna": anna, "out": tmp_path / "out.safetensors"}
    done = pulid("tune", *(argument.format(**places) for argument in arguments))
    assert done.is_one_sentence, done.err
    assert message in done.err
    assert not (tmp_path / "out.safetensors").exists()


def test_generate_needs_the_file_of_the_person(pulid: Run, anna: Path, tmp_path: Path) -> None:
    done = pulid("generate", PROMPT, "--method", "lora", "-o", tmp_path)
    assert done.is_one_sentence and "`pulid tune lora` writes it" in done.err


def test_generate_refuses_an_image_next_to_the_file(pulid: Run, anna: Path, tmp_path: Path) -> None:
    out = tmp_path / "anna.safetensors"
    done = pulid("tune", "lora", anna, "-o", out, "--steps", 1, "--batch", 1)
    assert done.code == 0, done.err
    person = ("--method", "lora", "--adapter", out, "--id", anna)
    done = pulid("generate", PROMPT, *person, "-o", tmp_path / "images")
    assert done.is_one_sentence, done.err
    assert "shows the person it was tuned on; leave --id out" in done.err


def test_checkpoints_stay_if_the_file_cannot_be_written(
    pulid: Run, anna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command then writes it without training again."""
    out = tmp_path / "anna.safetensors"
    command = ("tune", "lora", anna, "-o", out, "--steps", 2, "--batch", 1)

    def fail(*arguments: object) -> None:
        raise OutputError("no space is left.")

    with monkeypatch.context() as patch:
        patch.setattr(TunedLora, "save", fail)
        assert "no space is left" in pulid(*command).err
    assert (tmp_path / "anna-run" / "run.safetensors").exists()
    monkeypatch.setattr(TuningTask, "losses", None)  # a step would fail
    done = pulid(*command)
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == [out]
