"""Mistakes are reported before any model is loaded.

The networks of the preset `poisoned` are no weights. Whatever loads one of them fails with another
message.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openpulid.pipelines.presets import MINIATURE
from openpulid.world.gallery import render_portrait
from tests.cli.conftest import Run
from tests.support.people import someone

ADAPTER = "pulid-stage3.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a poisoned preset, and files that are right or wrong."""
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(MINIATURE, folder / "poisoned")
    for path in (folder / "poisoned").rglob("*.safetensors"):
        if path.name != ADAPTER:
            path.write_text("poison")
    render_portrait(1_000_007, 96).save(folder / "anna.png")
    Image.new("L", (96, 96)).save(folder / "black.png")
    Image.new("L", (96, 96), 255).save(folder / "mask.png")
    for name in ("notes.png", "notes.safetensors", "file"):
        (folder / name).write_text("hello")
    (folder / "folder").mkdir()
    someone(1).save(folder / "other.safetensors")
    people = folder / "people"
    people.mkdir()
    shutil.copy(folder / "anna.png", people)
    suite = {"about": "poisoned", "preset": "./poisoned", "seeds": [1]}
    (folder / "suite.json").write_text(json.dumps(suite | {"prompts": [{"text": "portrait"}]}))
    return folder


@pytest.fixture
def run(files: Path, pulid: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in that folder, without any published weight."""
    monkeypatch.chdir(files)
    monkeypatch.delenv("PULID_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(files / "cache"))
    return pulid


PERSON = ("--id", "anna.png")
INIT = ("--init-image", "anna.png")
CONTROL = ("--control", "folder", "--control-image")
FLUX = ("--preset", "flux")
SDXL = ("--preset", "sdxl")
INFINITEYOU = (*FLUX, "--method", "infiniteyou")
BENCH = ("bench", "run", "suite.json", "--people", "people", "-o")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "portrait"), "vae/diffusion_pytorch_model.safetensors cannot be loaded"),
        (("generate", "portrait", *PERSON), "poisoned/detector.safetensors is not a complete"),
        (("identify", "anna.png", "-o", "new.safetensors"), "poisoned/detector.safetensors is not"),
        ((*BENCH, "control-run"), "scrfd_10g_bnkps.onnx is not installed"),
    ],
)
def test_poison_is_noticed_when_a_model_is_loaded(
    run: Run, words: tuple[str, ...], message: str
) -> None:
    """Otherwise the tests below would show nothing."""
    preset = () if words[0] == "bench" else ("--preset", "poisoned")
    done = run(*words, *preset)
    assert done.is_one_sentence and message in done.err, done


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # models
        (("--preset", "minii"), "there is no preset 'minii' (did you mean 'mini'?)"),
        (("--preset", "folder"), "there is no preset 'folder'"),
        (("--method", "fidelty"), "did you mean 'fidelity'?"),
        ((*FLUX, "--method", "instantid"), "only available for SDXL presets"),
        (("--method", "infiniteyou"), "only available for FLUX presets"),
        (INFINITEYOU, "infusenet (ByteDance/InfiniteYou/infu_flux_v1.0/aes_stage2/InfuseNetMod"),
        (INFINITEYOU, "`pulid weights get flux-dev infiniteyou detector "),
        ((*INFINITEYOU, "--num-zero", 3), "does not support: --num-zero"),
        ((*INFINITEYOU, "--start-step", 4), "with infiniteyou does not support: --start-step"),
        ((*INFINITEYOU, *PERSON, "--end", 0.01), "none of the 28 steps is between"),
        ((*INFINITEYOU, "--adapter", f"poisoned/{ADAPTER}"), "contains no InfiniteYou; it needs"),
        ((*INFINITEYOU, "--adapter", "folder"), "folder contains no InfiniteYou; it needs"),
        (("--base", "none.safetensors"), "none.safetensors does not exist"),
        (("--base", "folder"), "folder contains no pipeline"),
        (("--base", "notes.safetensors"), "notes.safetensors cannot be loaded: it is damaged"),
        (("--base", f"poisoned/{ADAPTER}"), "is no SDXL checkpoint; it is PuLID's adapter"),
        ((*SDXL, "--base", "none.safetensors"), "none.safetensors does not exist"),
        ((*SDXL, "--base", "juggernot"), "(did you mean 'juggernaut'?)"),
        (("--adapter", "none.safetensors"), "none.safetensors does not exist"),
        (("--adapter", "folder"), "folder is a folder; pass the adapter's file."),
        (("--adapter", "notes.safetensors"), "notes.safetensors cannot be loaded"),
        (("--adapter", "other.safetensors", *PERSON), "it is an identity (pass it with --id)"),
        (("--method", "faceid", "--adapter", f"poisoned/{ADAPTER}"), "it is PuLID's adapter"),
        ((*FLUX, "--adapter", f"poisoned/{ADAPTER}"), "is not PuLID's adapter for FLUX"),
        (("--memory", "16gb"), "--memory is only available for FLUX presets."),
        ((*SDXL, "--memory", "16gb"), "--memory is only available for FLUX presets."),
        ((*FLUX, "--memory", "16g"), "(did you mean '16gb'?)"),
        (("--faces", "folder"), "uses its own face models"),
        ((*SDXL, "--faces", "folder"), "folder is no insightface pack"),
        (("--device", "abacus"), "there is no device 'abacus' on this machine;"),
        (("--device", "cuda:77"), "there is no device 'cuda:77' on this machine;"),
        # people
        (("--id", "none.png"), "none.png: does not exist"),
        (("--id", "folder"), "folder: is a folder, not an image"),
        (("--id", "notes.png"), "notes.png: is not an image"),
        (("--id", "none.safetensors"), "none.safetensors does not exist"),
        (("--id", "notes.safetensors"), "notes.safetensors is not an identity file"),
        (("--id", "other.safetensors"), "other models"),
        (("--id", ""), "--id must not be empty."),
        ((*SDXL, "--id", "none.png"), "none.png: does not exist"),
        (("--face", 0), "--face requires a person"),
        ((*PERSON, "--order", "left_right"), "(did you mean 'left-right'?)"),
        (("--order", "left-right"), "--order requires a person"),
        ((*PERSON, "--mask", "none.png"), "none.png: does not exist"),
        ((*PERSON, "--mask", "0,0,2,1"), "--mask must be at most 1"),
        (("--mask", "mask.png"), "--mask requires a person"),
        ((*PERSON, "--mask", "mask.png", "--mask", "mask.png"), "1 --id and 2 --mask"),
        ((*PERSON, "--mask", "mask.png", "--method", "faceid"), "only supported by PuLID"),
        ((*PERSON, "--scale", 0.5, "--scale", 0.7), "2 --scale and 1 people"),
        ((*PERSON, "--scale", 50), "--scale must be at most 5"),
        ((*PERSON, "--projection", "ortho-v2"), "(did you mean 'ortho_v2'?)"),
        ((*PERSON, "--num-zero", 99999), "--num-zero must be at most"),
        ((*PERSON, "--start", 0.8, "--end", 0.2), "none of the 20 steps"),
        ((*PERSON, "--start-step", 4), "does not support: --start-step"),
        ((*FLUX, *PERSON, "--start-step", 99), "--start-step 99 is after the last step"),
        ((*FLUX, "--num-zero", 3), "does not support: --num-zero"),
        # images
        (("--size", "large"), "expected WIDTHxHEIGHT"),
        (("--size", "100x101"), "must be multiples of 8"),
        (("--size", "512x512"), "must be from 16 to 128"),
        ((*SDXL, "--size", "4096x1024"), "must be from 16 to 2048"),
        (("--seed", -2), "--seed must be at least 0"),
        (("--seed", 2**64), "--seed must be at most 18446744073709551615"),
        (("--seed", 2**64 - 1, "--num", 2), "is too large for 2 images"),
        (("--steps", 10**7), "--steps must be at most 1000"),
        (("--num", 10**9), "--num must be at most 1000"),
        (("--guidance", 1e9), "--guidance must be at most 100"),
        (("--negative", "zebra"), "does not know 'zebra' in the negative prompt"),
        (("--true-cfg", 3), "does not support: --true-cfg"),
        ((*FLUX, "--true-cfg", 3), "only work together"),
        ((*FLUX, "--negative", "red"), "only work together"),
        # other inputs
        (("--init-image", "none.png"), "none.png: does not exist"),
        (("--init-image", "notes.png"), "notes.png: is not an image"),
        (("--strength", 0.5), "--init-image is missing"),
        ((*INIT, "--strength", 0.01), "runs none of the 20 steps"),
        ((*INIT, "--resize", "cropp"), "(did you mean 'crop'?)"),
        ((*INIT, "--inpaint-mask", "none.png"), "none.png: does not exist"),
        ((*INIT, "--inpaint-mask", "black.png"), "--inpaint-mask is black everywhere"),
        (("--control", "control-edges"), "--control-image is missing"),
        (("--control-image", "anna.png"), "--control is missing"),
        ((*CONTROL, "none.png"), "none.png: does not exist"),
        ((*CONTROL, "anna.png"), "folder contains no diffusers ControlNet"),
        (("--control", "control-edge", "--control-image", "anna.png"), "'control-edges'"),
    ],
)
def test_generate(run: Run, words: tuple[Any, ...], message: str) -> None:
    preset = () if "--preset" in words else ("--preset", "poisoned")
    done = run("generate", "portrait", *preset, *words, "-o", "out")
    assert done.is_one_sentence and message in done.err, done
    assert not list(Path("out").glob("*"))


@pytest.mark.parametrize("folder", ["file", "file/x", "/proc", "/sys"])
def test_output_folder_is_written_to_first(run: Run, folder: str) -> None:
    if not Path(folder.split("/x")[0]).exists():
        pytest.skip("Linux")
    for words in (
        ("generate", "portrait", "--preset", "poisoned", "-o", folder),
        ("identify", "anna.png", "--preset", "poisoned", "-o", f"{folder}/anna.safetensors"),
        ("world", "sheet", "-o", f"{folder}/sheet.png"),
        ("demo", "-o", folder),
        (*BENCH, folder),
    ):
        done = run(*words)
        assert done.is_one_sentence and "cannot be used as a directory" in done.err, done


def test_unknown_word(run: Run) -> None:
    done = run("generate", "portrait, zebra", "--preset", "poisoned", "-o", "out")
    assert done.is_one_sentence and "the model does not know 'zebra'" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.png",), "none.png: does not exist"),
        (("folder",), "folder: is a folder, not an image"),
        (("notes.png",), "notes.png: is not an image"),
        (("anna.png", "--order", "left_right"), "(did you mean 'left-right'?)"),
        (("anna.png", "anna.png", "--fusion", "middle"), "there is no fusion 'middle'"),
        (("anna.png", "--face", "left"), "--face must be a number"),
        (("anna.png", "--method", "magic"), "there is no method 'magic'"),
        (("anna.png", "--faces", "folder"), "uses its own face models"),
        (("anna.png", "--show", "faces.pdf"), "use the name of an image, such as faces.png"),
        (("anna.png", "--device", "abacus"), "there is no device 'abacus'"),
    ],
)
def test_identify(run: Run, words: tuple[str, ...], message: str) -> None:
    done = run("identify", *words, "--preset", "poisoned", "-o", "new.safetensors")
    assert done.is_one_sentence and message in done.err, done
    assert not Path("new.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "none.safetensors"), "none.safetensors does not exist"),
        (("--base", "folder"), "folder contains no pipeline"),
        (("--adapter", "notes.safetensors"), "notes.safetensors cannot be loaded"),
        (("--adapter", "other.safetensors"), "it is an identity"),
        (("--memory", "16gb"), "--memory is only available for FLUX presets."),
        (("--faces", "folder"), "uses its own face models"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1 is not an address of this machine"),
    ],
)
def test_web(run: Run, words: tuple[str, ...], message: str) -> None:
    done = run("web", "--preset", "poisoned", "--port", 0, *words)
    assert done.is_one_sentence and message in done.err, done


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "magic"), "there is no method 'magic'"),
        (("--methods", "pulid@x"), "expected METHOD, METHOD:FILE"),
        (("--methods", "pulid:none.safetensors"), "none.safetensors does not exist"),
        (("--methods", "pulid:notes.safetensors"), "notes.safetensors cannot be loaded"),
        (("--methods", "pulid:other.safetensors"), "it is an identity"),
        (("--people", "none"), "none is not a folder"),
        (("--workers", "many"), "--workers many: expected a number"),
        (("--workers", "0"), "--workers 0: expected a number"),
    ],
)
def test_bench(run: Run, words: tuple[str, ...], message: str) -> None:
    done = run(*BENCH, "new", *words)
    assert done.is_one_sentence and message in done.err, done
    assert not Path("new").exists()


def test_image_of_the_world_is_not_drawn_for_a_wrong_name(run: Run) -> None:
    for command in (("person", "--seed", 1), ("sheet", "--size", 512)):
        done = run("world", *command, "-o", "image.pdf")
        assert done.is_one_sentence and "use the name of an image" in done.err
