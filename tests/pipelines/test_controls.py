"""ControlNets of a request: files, control images, several at once, memory levels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from typer.testing import CliRunner

from openpulid.cli.main import app
from openpulid.errors import OptionError, WeightsError
from openpulid.io.hub import FOLDER_VARIABLE
from openpulid.io.registry import WEIGHTS
from openpulid.methods.control_maps.depth import estimate_depth
from openpulid.methods.control_maps.edges import canny_edges
from openpulid.methods.control_maps.pose import detect_poses, draw_poses
from openpulid.methods.pulid import IDEncoder, PuLID
from openpulid.pipelines.control_images import detect_map
from openpulid.pipelines.controls import find_missing_map, open_controls
from openpulid.pipelines.factory import load_pipeline
from openpulid.pipelines.inputs import open_inputs
from openpulid.pipelines.presets import MINIATURE, flux, mini, sdxl
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import RequestError
from openpulid.pipelines.request_inputs import Control, InitImage, Person
from openpulid.pipelines.studio import Studio
from tests.support.map_networks import save_depth_estimator, save_pose_models
from tests.support.people import anna, distance
from tests.support.tiny_flux import fresh, tiny_controlnet, tiny_pipe

SQUARE = Image.new("RGB", (96, 96))
SQUARE.paste("orange", (20, 20, 70, 70))


class UnusedExtractor:
    """Extractor of a studio that receives identities alone."""

    models = anna.models


def flux_studio(pipe: Any, memory: str = "full") -> Studio:
    preset = flux().with_models(use_half_precision=False, size_multiple=4, memory=memory)
    preset = preset.with_models(native_side=32, min_side=4)
    preset = preset.with_defaults(
        num_inference_steps=4, width=32, height=32, max_sequence_length=10
    )
    return Studio(pipe, fresh(pipe), UnusedExtractor(), preset)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ControlNets for the tiny FLUX and the miniature, and two images."""
    path = tmp_path_factory.mktemp("controls")
    for name, net in (
        ("flux", tiny_controlnet(1)),
        ("other", tiny_controlnet(2)),
        ("modes", tiny_controlnet(3, num_mode=5)),
    ):
        net.to(torch.bfloat16).save_pretrained(path / name)
    unet = UNet2DConditionModel.from_pretrained(MINIATURE / "pipeline" / "unet")
    torch.manual_seed(0)
    mini = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    torch.nn.init.normal_(mini.controlnet_mid_block.weight, std=0.3)
    mini.save_pretrained(path / "mini")
    SQUARE.save(path / "square.png")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(path / "noise.png")
    return path


@pytest.fixture(scope="module")
def depth_estimator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_depth_estimator(tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="module")
def pose_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pose_models(tmp_path_factory.mktemp("poses"))


def pixels(studio: Studio, **fields: Any) -> np.ndarray:
    request = GenerationRequest(prompt="portrait", seed=1, **fields)
    return np.asarray(studio.generate(request).images[0]).astype(np.float32) / 255


def prepare_image(control: Control, image: Image.Image) -> Image.Image:
    """Return the control image of an image."""
    missing = find_missing_map(control, image)
    return image if missing is None else detect_map(missing, image, control.image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", ["12gb", "8gb", "6gb"])
def test_controlnet_of_sdxl_is_kept_as_the_memory_level_says(
    folder: Path, tmp_path: Path, memory: str, dtype: torch.dtype
) -> None:
    """In 8 bits at 8gb; on the CPU the other levels keep it as it is."""
    net = ControlNetModel.from_pretrained(folder / "mini")
    torch.manual_seed(1)
    for layer in net.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.3)
    net.save_pretrained(tmp_path / "strong")
    control = Control(tmp_path / "strong", folder / "square.png")
    preset = sdxl(MINIATURE / "pipeline").with_models(
        use_half_precision=False, native_side=96, sampler=None, is_miniature=True
    )
    preset = preset.with_defaults(num_inference_steps=2, width=96, height=96, negative_prompt="")
    images = []
    for level in ("full", memory):
        placed = preset.with_models(memory=level)
        # a network in 8 bits cannot be converted
        source = placed if dtype == torch.float32 else preset
        pipe = load_pipeline(source, torch.device("cpu")).to(dtype)
        encoder = IDEncoder(12, 64, vit_dim=8, hidden_dim=16)
        studio = Studio(pipe, PuLID.for_unet(pipe.unet, encoder), UnusedExtractor(), placed)
        request = GenerationRequest(prompt="portrait", seed=1, controls=[control])
        inputs = open_inputs(request, sdxl().models)
        image = studio.generate(request, inputs=inputs).images[0]
        images.append(np.asarray(image).astype(np.float32) / 255)
    weight = inputs.controls[0].files.network.model.mid_block.resnets[0].conv1.weight
    assert weight.dtype == (torch.float8_e4m3fn if memory == "8gb" else dtype)
    effect = np.abs(images[1] - pixels(studio)).mean()
    difference = np.abs(images[0] - images[1]).mean()
    assert effect > 0.1 and difference < 0.2 * effect
    assert (difference == 0) == (memory != "8gb")


def test_several_controls_act_on_flux(folder: Path) -> None:
    studio = flux_studio(tiny_pipe())
    first = Control(folder / "flux", folder / "square.png", end=0.5)
    second = Control(folder / "other", folder / "noise.png", 0.5, start=0.5)
    plain = pixels(studio)
    images = [plain]
    for controls in ([first], [second], [first, second], [second, first]):
        images.append(pixels(studio, controls=controls))
    for k, image in enumerate(images[:4]):
        assert all(distance(image, other) > 1e-3 for other in images[k + 1 : 4])
    assert distance(images[3], images[4]) < 1e-2  # the order does not matter but for rounding
    assert np.array_equal(pixels(studio), plain)


def test_controls_act_with_people_and_initial_images(folder: Path, tmp_path: Path) -> None:
    studio = flux_studio(tiny_pipe())
    anna.save(tmp_path / "anna.safetensors")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    control = Control(folder / "flux", folder / "noise.png")
    image = folder / "square.png"
    for init_image in (None, InitImage(image), InitImage(image, mask=tmp_path / "mask.png")):
        fields: dict[str, Any] = {
            "people": [Person(identity=tmp_path / "anna.safetensors")],
            "init_image": init_image,
        }
        if init_image is None:
            fields |= {"true_cfg_scale": 2.0, "negative_prompt": "a person"}
        both = pixels(studio, controls=[control], **fields)
        assert distance(both, pixels(studio, **fields)) > 1e-3
        alone = pixels(studio, controls=[control], **fields | {"people": []})
        assert distance(both, alone) > 1e-3


@pytest.mark.parametrize("memory", ["24gb", "16gb", "12gb"])
def test_controlnet_is_kept_as_the_memory_level_says(folder: Path, memory: str) -> None:
    """In 8 bits where the transformer is, with almost the same image."""
    control = Control(folder / "flux", folder / "noise.png")
    images = []
    for level in ("full", memory):
        studio = flux_studio(tiny_pipe().to(torch.bfloat16), level)
        request = GenerationRequest(prompt="portrait", seed=1, controls=[control, control])
        inputs = open_inputs(request, sdxl().models)
        image = studio.generate(request, inputs=inputs).images[0]
        images.append(np.asarray(image).astype(np.float32) / 255)
    first, second = inputs.controls
    assert first.files is second.files  # loaded once
    weight = first.files.network.model.transformer_blocks[0].attn.to_q.weight
    assert weight.dtype == (torch.bfloat16 if memory == "12gb" else torch.float8_e4m3fn)
    plain = pixels(studio)
    difference = np.abs(images[0] - images[1]).mean()
    assert difference < 0.2 * np.abs(images[0] - plain).mean()
    assert (difference == 0) == (memory == "12gb")


def test_union_with_modes_needs_the_kind(folder: Path) -> None:
    studio = flux_studio(tiny_pipe())
    with pytest.raises(RequestError, match=r"set controls\.0\.kind to edges, depth or pose"):
        pixels(studio, controls=[Control(folder / "modes", folder / "noise.png")])
    images = []
    for kind, mode in (("edges", 0), ("depth", 2), ("pose", 4)):
        control = Control(folder / "modes", folder / "noise.png", kind=kind, is_map=True)
        images.append(pixels(studio, controls=[control]))
        assert open_controls([control])[0].options["mode"] == mode
    assert min(distance(images[0], images[1]), distance(images[1], images[2])) > 1e-3


def test_controlnet_of_another_base_is_refused(folder: Path) -> None:
    """The base model is not needed for that."""
    for name, preset, problem in (
        ("flux", mini(), "a ControlNet for FLUX.1, and the base model is the miniature; use a"),
        ("mini", flux(), "a ControlNet for SDXL, and the base model is FLUX.1; use a ControlNet"),
    ):
        control = Control(folder / name, folder / "square.png")
        inputs = open_inputs(GenerationRequest("portrait", controls=[control]), sdxl().models)
        with pytest.raises(WeightsError, match=problem):
            inputs.check(preset.models)


@pytest.mark.parametrize("kind", ["edges", "depth", "pose"])
def test_ready_map_is_used_as_it_is(kind: str, folder: Path) -> None:
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8) * 2, (96, 96))
    joints = [[*(np.array([0.3 + 0.02 * k, 0.1 + 0.05 * k]) * 96), 1.0] for k in range(17)]
    maps = {
        "edges": canny_edges(SQUARE),
        "depth": Image.fromarray(ramp).convert("RGB"),
        "pose": draw_poses([np.array(joints)], (96, 96)),
    }
    control = Control("some-directory", "a.png", kind=kind)
    assert prepare_image(control, maps[kind]) is maps[kind]
    # a photo of something that looks like a map
    asked = control.model_copy(update={"is_map": False})
    if kind == "edges":
        assert prepare_image(asked, maps[kind]).tobytes() == canny_edges(maps[kind]).tobytes()
        return
    missing = {"depth": "depth-estimator", "pose": "person-detector"}[kind]
    for part, image in ((asked, maps[kind]), (control, SQUARE)):
        with pytest.raises(WeightsError, match=f"`pulid weights get {missing}` downloads it"):
            prepare_image(part, image)


def test_image_of_an_unknown_controlnet_is_used_as_it_is() -> None:
    for control in (Control("some-directory", "a.png"), Control("control-pose", "a", is_map=True)):
        assert prepare_image(control, SQUARE) is SQUARE
    detected = prepare_image(Control("control-edges", "a.png"), SQUARE)
    assert detected.tobytes() == canny_edges(SQUARE).tobytes()


def test_maps_are_detected_with_installed_weights(
    folder: Path,
    depth_estimator: Path,
    pose_models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = ("depth-estimator", "person-detector", "pose-estimator")
    for name, path in zip(names, (depth_estimator, *pose_models), strict=True):
        (tmp_path / WEIGHTS[name].repo.split("/")[-1]).symlink_to(path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    depth = prepare_image(Control("control-depth", "a.png"), SQUARE)
    assert depth.tobytes() == estimate_depth(SQUARE, depth_estimator).tobytes()
    capfd.readouterr()
    pose = prepare_image(Control("control-pose", "a.png"), SQUARE)
    assert not capfd.readouterr().err  # no progress bars
    expected = draw_poses(detect_poses(SQUARE, *pose_models), SQUARE.size)
    assert pose.tobytes() == expected.tobytes()


def test_image_without_a_person_is_one_sentence(
    pose_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in zip(("person-detector", "pose-estimator"), pose_models, strict=True):
        copy = tmp_path / WEIGHTS[name].repo.split("/")[-1]
        shutil.copytree(path, copy)
        text = (copy / "config.json").read_text("utf-8")
        (copy / "config.json").write_text(text.replace('"person"', '"cat"'), "utf-8")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(OptionError, match=r"a\.png shows no person whose pose could be detected"):
        prepare_image(Control("control-pose", "a.png"), SQUARE)


def test_command_line_regenerates_with_several_controls(folder: Path, tmp_path: Path) -> None:
    calls = ["generate", "portrait, photo", "--steps", "2"]
    controls = []
    for image in ("square.png", "noise.png"):
        controls += ["--control", str(folder / "mini"), "--control-image", str(folder / image)]
    options = ["--control-scale", "0.5", "--control-start", "0", "--control-start", "0.5"]
    options += ["--control-end", "0.5", "--control-end", "1"]
    for arguments in ([*calls, *controls, *options], ["generate", "--from", "FIRST", *controls]):
        images = sorted(tmp_path.glob("*/*.png"))
        arguments = [str(images[0]) if word == "FIRST" else word for word in arguments]
        out = tmp_path / str(len(images))
        result = CliRunner().invoke(app, [*arguments, "-o", str(out)])
        assert result.exit_code == 0, result.exception
    first, again = sorted(tmp_path.glob("*/*.png"))
    assert Image.open(first).tobytes() == Image.open(again).tobytes()
    stored = Provenance.read(first).request.controls
    assert [(control.scale, control.start, control.end) for control in stored] == [
        (0.5, 0.0, 0.5),
        (0.5, 0.5, 1.0),
    ]
    refused = CliRunner().invoke(app, ["generate", "--from", str(first), *controls[:4]])
    assert "generated with mini and noise.png; pass --control and --control-image." in str(
        refused.exception
    )


def test_what_is_to_be_detected_must_be_known(folder: Path) -> None:
    control = Control(str(folder / "mini"), str(folder / "square.png"), is_map=False)
    with pytest.raises(RequestError, match="what is to be detected") as raised:
        open_controls([control])
    assert raised.value.fields == ("controls.0.model", "controls.0.kind")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--control-image", "a.png"),
            "2 --control and 1 --control-image: pass --control-image one for each, in the same",
        ),
        (
            ("--control-image", "a", "--control-image", "b", *3 * ("--control-scale", "1")),
            "2 --control and 3 --control-scale: pass --control-scale one for all, or one for each",
        ),
        (("--control-map", "redy"), "--control-map must be ready or detect, got 'redy' (did you"),
        (
            ("--control-image", "a", "--control-image", "b", "--control-kind", "deep"),
            "--control-kind must be 'edges', 'depth' or 'pose', got 'deep'",
        ),
        (
            (*2 * ("--control-image", "a"), "--control-start", "0.5", "--control-end", "0.5"),
            "--control-start 0.5 is not before --control-end 0.5, so that the ControlNet would not",
        ),
    ],
)
def test_mistakes_are_one_sentence(options: tuple[str, ...], message: str) -> None:
    calls = ["generate", "portrait", "--control", "control-pose", "--control", "control-depth"]
    result = CliRunner().invoke(app, [*calls, *options])
    assert isinstance(result.exception, OptionError) and message in str(result.exception)
