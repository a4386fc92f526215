"""Mistakes are reported at once, before any model is loaded.

The networks of the preset `poisoned` are no weights. Whatever loads one of them fails with another
message. Of the ControlNet and the IP-Adapter, which are complete, no tensor may be read.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_parameter_registration_hook

from openpulid.io.checkpoints import safe_open
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS
from openpulid.pipelines.presets import MINIATURE
from openpulid.world.gallery import render_portrait
from tests.cli.conftest import Output, Run
from tests.support.people import someone
from tests.support.tiny_flux import tiny_controlnet

ADAPTER = "pulid-stage3.safetensors"

MAX_SECONDS = 1.0
"""CPU time until a mistake is reported, once the libraries are imported."""


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
    sizes: dict[str, Any] = {"norm_num_groups": 4, "attention_head_dim": 2, "layers_per_block": 1}
    ControlNetModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(8, 8),
        cross_attention_dim=8,
        **sizes,
    ).save_pretrained(folder / "controlnet")
    tiny_controlnet().save_pretrained(folder / "controlnet-flux")
    published = folder / "published"
    for name in ("ip-adapter", "clip-h"):
        path = published / WEIGHTS[name].file
        path.parent.mkdir(parents=True)
        names = ("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")
        save_file({name: torch.ones(4, 4) for name in names}, path)
    suite = {"about": "poisoned", "preset": "./poisoned", "seeds": [1]}
    (folder / "suite.json").write_text(json.dumps(suite | {"prompts": [{"text": "portrait"}]}))
    return folder


@pytest.fixture
def command(files: Path, pulid: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in that folder; the published weights are those of an IP-Adapter alone."""
    monkeypatch.chdir(files)
    monkeypatch.setenv(FOLDER_VARIABLE, str(files / "published"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(files / "cache"))
    return pulid


@contextmanager
def watch_loading(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield a list of the networks that are built and the tensors that are read."""
    loaded: list[str] = []

    def note_parameter(module: torch.nn.Module, name: str, parameter: Any) -> None:
        loaded.append(f"{type(module).__name__}.{name}")

    class WatchedFile:
        """A file of weights whose tensors are noted when they are read."""

        def __init__(self, path: Any, **options: Any) -> None:
            self._path = path
            self._file = safe_open(path, **options)

        def __enter__(self) -> WatchedFile:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            loaded.append(f"{self._path}: {name}")
            return self._file.get_tensor(name)

    monkeypatch.setattr("openpulid.io.checkpoints.safe_open", WatchedFile)
    handle = register_module_parameter_registration_hook(note_parameter)
    try:
        yield loaded
    finally:
        handle.remove()


@pytest.fixture
def run(command: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command; it fails without having loaded anything, and at once."""

    def run_watched(*arguments: object) -> Output:
        for is_repeated in (False, True):
            start = time.process_time()
            with watch_loading(monkeypatch) as loaded:
                done = command(*arguments)
            assert not loaded, f"{loaded[:3]} were loaded before {done.err}"
            seconds = time.process_time() - start
            if seconds < MAX_SECONDS:
                break
            # the first run may have imported a library
            assert not is_repeated, f"{seconds:.1f} s until {done.err}"
        return done

    return run_watched


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
        ((*BENCH, "control-run"), "vae/diffusion_pytorch_model.safetensors cannot be loaded"),
    ],
)
def test_poison_is_noticed_when_a_model_is_loaded(
    command: Run, words: tuple[str, ...], message: str
) -> None:
    """Otherwise the tests below would show nothing."""
    preset = () if words[0] == "bench" else ("--preset", "poisoned")
    done = command(*words, *preset)
    assert done.is_one_sentence and message in done.err, done


def test_loading_is_noticed(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with watch_loading(monkeypatch) as loaded:
        assert "vae/" in command("generate", "portrait", "--preset", "poisoned").err
    assert f"poisoned/{ADAPTER}: id_adapter.body.0.bias" in loaded
    assert any(name.startswith("Linear.") for name in loaded)
    with watch_loading(monkeypatch) as loaded:
        ControlNetModel.from_pretrained("controlnet")
    assert "Conv2d.weight" in loaded


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
        (("--memory", "16gb"), "has no memory levels; leave --memory out."),
        ((*SDXL, "--memory", "16gb"), "choose one of full, 12gb, 8gb, 6gb."),
        (
            (*SDXL, "--method", "ip-adapter", "--memory", "8gb"),
            "preset 'sdxl' with ip-adapter has no memory levels",
        ),
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
        (("--size", "512x512"), "must be from 16 to 160"),
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
        (
            (*CONTROL[:3], "anna.png", "--control-kind", "deep"),
            "must be 'edges', 'depth' or 'pose'",
        ),
        (
            ("--control", "control-pose", "--control-image", "anna.png", "--control-start", 1),
            "--control-start 1 is not before --control-end 1",
        ),
        (("--lora", "none.safetensors"), "none.safetensors does not exist"),
        (("--lora", "folder"), "folder is not the folder of one LoRA: it holds none."),
        (("--lora", "notes.safetensors"), "notes.safetensors"),
        (("--lora", f"poisoned/{ADAPTER}"), "is not a LoRA: it is PuLID's adapter for SDXL"),
        (("--lora-scale", 0.5), "0 --lora and 1 --lora-scale"),
        (("--embedding", "none.safetensors"), "none.safetensors does not exist"),
        (("--embedding", "notes.safetensors"), "notes.safetensors"),
        (("--embedding-token", "word"), "0 --embedding and 1 --embedding-token"),
        (("--style-scale", 0.5), "--style is missing"),
        ((*SDXL, "--style", "none.png"), "none.png: does not exist"),
        ((*FLUX, "--style", "anna.png"), "`pulid weights get ip-adapter-flux clip-l`"),
        (("--refine-strength", 0.01), "runs none of the 20 steps"),
        (("--pose-from-prompt", "--method", "faceid"), "does not support: --pose-from-prompt"),
        (("--compile", "--method", "faceid"), "with faceid does not support: --compile."),
        ((*FLUX, "--no-compile"), "does not support: --compile."),
        (("--grid", "zoom=1,2"), "--grid has no option 'zoom'"),
        (("--grid", "guidance=4,1000"), "--guidance must be at most 100"),
        (("--name", "{person}"), "person"),
        (("--from", "none.png"), "none.png: No such file"),
        (("--from", "anna.png"), "anna.png contains no generation parameters"),
        (("--c2pa", "--c2pa-cert", "none.pem"), "c2pa"),
    ],
)
def test_generate(run: Run, words: tuple[Any, ...], message: str) -> None:
    prompt = () if "--from" in words else ("portrait",)
    preset = () if {"--preset", "--from"} & set(words) else ("--preset", "poisoned")
    done = run("generate", *prompt, *preset, *words, "-o", "out")
    assert done.is_one_sentence and message in done.err, done
    assert not list(Path("out").glob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lora", "none.safetensors"), "none.safetensors does not exist"),
        (("--adapter", "none.safetensors"), "none.safetensors does not exist"),
        (("--base", "folder"), "folder contains no pipeline"),
        (("--id", "other.safetensors"), "other models"),
        (("--id", "anna.png", "--mask", "none.png"), "none.png: does not exist"),
        (("--size", "100x101"), "must be multiples of 8"),
        (("--grid", "init-image=anna.png,none.png"), "none.png: does not exist"),
        ((*FLUX, "--steps", 5), "a ControlNet for SDXL, and the base model is FLUX.1"),
        (("--control", "controlnet-flux"), "a ControlNet for FLUX.1, and the base model is the"),
        (
            ("--control", "controlnet", "--control-kind", "pose"),
            "`pulid weights get person-detector` downloads it",
        ),
    ],
)
def test_controlnet_is_not_loaded_before_another_mistake(
    run: Run, words: tuple[Any, ...], message: str
) -> None:
    preset = () if "--preset" in words else ("--preset", "poisoned")
    control = () if "--control" in words else ("--control", "controlnet")
    image = ("--control-image", "anna.png")
    done = run("generate", "portrait", *preset, *control, *image, *words, "-o", "out")
    assert done.is_one_sentence and message in done.err, done


def test_style_adapter_is_not_loaded_before_another_mistake(run: Run) -> None:
    words = ("--preset", "sdxl", "--style", "anna.png", "-o", "out")
    for options, message in (
        ((), "preset 'sdxl' needs weights that are not installed"),
        (("--lora", "none.safetensors"), "none.safetensors does not exist"),
    ):
        done = run("generate", "portrait", *words, *options)
        assert done.is_one_sentence and message in done.err, done


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
        (("--memory", "16gb"), "has no memory levels; leave --memory out."),
        (("--faces", "folder"), "uses its own face models"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1 is not an address of this machine"),
    ],
)
def test_web(run: Run, words: tuple[str, ...], message: str) -> None:
    done = run("web", "--preset", "poisoned", *words)
    assert done.is_one_sentence and message in done.err, done


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "magic"), "there is no method 'magic'"),
        (("--methods", "pulid@x"), "expected METHOD, METHOD:FILE"),
        (("--scales", "0.3;0.5"), "expected numbers with commas"),
        (("--scales", "1000"), "1000"),
        (("--preset", "sdlx"), "did you mean 'sdxl'?"),
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
