"""LoRAs of a request, next to diffusers' own `load_lora_weights`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from openpulid.errors import OptionError, WeightsError
from openpulid.io import hub
from openpulid.io.lora_files import check_lora, select_lora_file
from openpulid.pipelines.inputs import open_inputs
from openpulid.pipelines.lora_loading import fuse_lora
from openpulid.pipelines.loras import LoraInput, open_lora, use_loras
from openpulid.pipelines.memory_levels import LEVELS, place_pipeline, stream_pipeline
from openpulid.pipelines.presets import flux, mini, sdxl
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Lora, Person
from openpulid.pipelines.studio import Studio
from tests.support.people import anna
from tests.support.studios import (
    assert_same_state,
    components_state,
    flux_studio,
    pixels,
    run_diffusers,
    sdxl_studio,
)
from tests.support.tiny_flux import tiny_pipe

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SGM_BLOCKS = {
    "down_blocks_1_attentions_0": "input_blocks_3_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
}
"""Blocks of the tiny U-Net in diffusers' and in the original names, which kohya's trainer uses."""


def save_lora(pipe: Any, folder: Path, seed: int = 1) -> Path:
    """Save a random LoRA of all networks that one can change, as diffusers' trainers do."""
    torch.manual_seed(seed)
    layers = {}
    targets = {"unet": ATTENTION, "transformer": [*ATTENTION, "proj_mlp"], "text_encoder": TEXT}
    for name, modules in [*targets.items(), ("text_encoder_2", TEXT)]:
        network = getattr(pipe, name, None)
        if network is None or (name == "text_encoder_2" and not hasattr(pipe, "unet")):
            continue
        config = LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False)
        network.add_adapter(config, "saved")
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network, adapter_name="saved")
    folder.mkdir(parents=True, exist_ok=True)
    pipe.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def to_kohya(path: Path, target: Path, alpha: float = 1.0) -> Path:
    """Convert a LoRA for the tiny SDXL pipeline to the names of kohya's trainer."""
    renamed = {}
    for name, tensor in load_file(path).items():
        network, _, rest = name.partition(".")
        layer, side = rest.removesuffix(".weight").split(".lora_")
        layer = layer.replace(".", "_")
        if network == "unet":
            for block, original in SGM_BLOCKS.items():
                layer = layer.replace(block, original)
        prefix = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}[network]
        if prefix == "te1" and not layer.startswith("text_model"):
            layer = f"text_model_{layer}"
        key = f"lora_{prefix}_{layer}"
        renamed[f"{key}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
        renamed[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(renamed, target)
    return target


@pytest.fixture(scope="module")
def studios(tiny_pipeline: Any) -> dict[str, Studio]:
    return {"sdxl": sdxl_studio(tiny_pipeline()), "flux": flux_studio(tiny_pipe())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Any) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for seed in (1, 2):
        save_lora(tiny_pipeline(), folder / f"sdxl{seed}", seed)
        save_lora(tiny_pipe(), folder / f"flux{seed}", seed)
    to_kohya(
        folder / "sdxl1" / "pytorch_lora_weights.safetensors", folder / "C:kohya 1.safetensors"
    )
    anna.save(folder / "anna.safetensors")
    return folder


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_several_loras_are_those_of_diffusers(
    family: str, studios: dict[str, Studio], folder: Path
) -> None:
    studio = studios[family]
    plain = run_diffusers(studio)
    before = components_state(studio.pipe)
    loras = [Lora(folder / f"{family}1", 0.8), Lora(folder / f"{family}2", -0.5)]
    request = GenerationRequest("portrait", seed=5, loras=loras)
    image = pixels(studio.generate(request).images[0])
    assert_same_state(components_state(studio.pipe), before)
    assert np.array_equal(run_diffusers(studio), plain)

    for number in "12":
        studio.pipe.load_lora_weights(str(folder / f"{family}{number}"), adapter_name=number)
    studio.pipe.set_adapters(["1", "2"], [0.8, -0.5])
    expected = run_diffusers(studio)
    with pytest.raises(OptionError, match=r"has LoRAs of its own \(1, 2\)"):
        studio.generate(request)
    studio.pipe.unload_lora_weights()
    assert np.array_equal(image, expected)
    assert np.abs(image - plain).max() > 2


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_fused_lora_is_in_the_weights(family: str, folder: Path, tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline() if family == "sdxl" else tiny_pipe()
    studio = sdxl_studio(pipe) if family == "sdxl" else flux_studio(pipe)
    pipe.load_lora_weights(str(folder / f"{family}1"), adapter_name="1")
    pipe.set_adapters(["1"], [0.8])
    expected = run_diffusers(studio)
    pipe.unload_lora_weights()
    plain = run_diffusers(studio)
    fuse_lora(pipe, open_lora(Lora(folder / f"{family}1")).path, 0.8)
    fused = run_diffusers(studio)
    assert not any(pipe.get_list_adapters().values())
    assert np.abs(fused.astype(float) - expected).max() <= 1
    assert np.abs(fused.astype(float) - plain).max() > 2


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_lora_next_to_an_identity(family: str, studios: dict[str, Studio], folder: Path) -> None:
    studio = studios[family]
    person = Person(identity=folder / "anna.safetensors", scale=1.0)
    request = GenerationRequest("portrait", seed=4, num_images=2, people=[person])
    with_lora = request.model_copy(update={"loras": (Lora(folder / f"{family}1"),)})
    without = studio.generate(request).images
    both = studio.generate(with_lora).images
    assert np.array_equal(pixels(studio.generate(request).images[1]), pixels(without[1]))

    studio.pipe.load_lora_weights(str(folder / f"{family}1"))
    with studio.adapter.use(anna, scale=1.0, pipe=studio.pipe, **identity_options(studio)):
        expected = run_diffusers(studio)
    alone = run_diffusers(studio)
    studio.pipe.unload_lora_weights()
    assert np.array_equal(pixels(both[1]), expected)
    assert min(np.abs(x - expected).max() for x in (alone, pixels(without[1]))) > 2


def identity_options(studio: Studio) -> dict[str, Any]:
    options = studio.preset.defaults.identity.model_dump(exclude_none=True)
    return {name: value for name, value in options.items() if name != "scale"}


def test_kohya_file_is_the_same_lora(studios: dict[str, Studio], folder: Path) -> None:
    """With an alpha of half the rank it has half the effect."""
    studio = studios["sdxl"]
    images = []
    for lora in (Lora(folder / "C:kohya 1.safetensors", 1.0), Lora(folder / "sdxl1", 0.5)):
        request = GenerationRequest("portrait", seed=5, loras=[lora])
        images.append(pixels(studio.generate(request).images[0]))
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[0] - run_diffusers(studio)).max() > 2


@pytest.mark.parametrize(("family", "level"), [("flux", "24gb"), ("flux", "16gb"), ("sdxl", "8gb")])
def test_lora_at_a_memory_level(family: str, level: str, folder: Path, tiny_pipeline: Any) -> None:
    """The base is stored in 8 bits, so its image differs a little; the LoRA's layers are not."""
    if family == "flux":
        exact, placed = flux_studio(tiny_pipe()), flux_studio(tiny_pipe())
    else:
        exact, placed = sdxl_studio(tiny_pipeline()), sdxl_studio(tiny_pipeline())
    place_pipeline(placed.pipe, LEVELS[family][level], torch.device("cpu"))
    request = GenerationRequest("portrait", seed=5)
    with_lora = GenerationRequest("portrait", seed=5, loras=[Lora(folder / f"{family}1")])
    before = placed.generate(request).images[0]
    changes = []
    for studio in (exact, placed):
        plain, image = (pixels(studio.generate(r).images[0]) for r in (request, with_lora))
        changes.append(image - plain)
    assert np.abs(changes[0] - changes[1]).mean() < 0.5 * np.abs(changes[0]).mean()
    assert np.array_equal(pixels(placed.generate(request).images[0]), pixels(before))


def test_lora_on_a_streamed_transformer(folder: Path) -> None:
    """As at the level 12gb, with the CPU as the device."""
    pipe = tiny_pipe()
    studio = flux_studio(pipe)
    with_lora = GenerationRequest("portrait", seed=5, loras=[Lora(folder / "flux1")])
    expected = pixels(studio.generate(with_lora).images[0])
    plain = run_diffusers(studio)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=2
    )
    assert np.array_equal(pixels(studio.generate(with_lora).images[0]), expected)
    assert np.array_equal(run_diffusers(studio), plain)


def test_lora_on_a_streamed_unet(folder: Path, tiny_pipeline: Any) -> None:
    """As at the level 6gb of SDXL, with the CPU as the device."""
    studio = sdxl_studio(tiny_pipeline())
    with_lora = GenerationRequest("portrait", seed=5, loras=[Lora(folder / "sdxl1")])
    expected = pixels(studio.generate(with_lora).images[0])
    plain = run_diffusers(studio)
    assert np.abs(expected - plain).max() > 2
    stream_pipeline(studio.pipe, torch.device("cpu"))
    assert np.array_equal(pixels(studio.generate(with_lora).images[0]), expected)
    assert np.array_equal(run_diffusers(studio), plain)


def test_lora_that_does_not_fit_leaves_the_pipeline_as_it_was(
    studios: dict[str, Studio], folder: Path, tmp_path: Path
) -> None:
    studio = studios["sdxl"]
    before = components_state(studio.pipe)
    tensors = load_file(folder / "sdxl1" / "pytorch_lora_weights.safetensors")
    name = next(name for name in tensors if name.startswith("unet") and "to_q.lora_A" in name)
    save_file({**tensors, name: torch.zeros(2, 7)}, tmp_path / "other.safetensors")
    save_file({"unet.other.lora_A.weight": torch.zeros(2, 7)}, tmp_path / "none.safetensors")
    for file, message in (("other", "does not fit this base model"), ("none", "no layer|not fit")):
        loras = [Lora(folder / "sdxl2"), Lora(tmp_path / f"{file}.safetensors")]
        with pytest.raises(WeightsError, match=message) as error:
            studio.generate(GenerationRequest("portrait", loras=loras))
        assert f"{file}.safetensors" in str(error.value) and "\n" not in str(error.value)
        assert_same_state(components_state(studio.pipe), before)


def header(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


KOHYA_KEY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"
DIFFUSERS_KEY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
OLD_KEY = (
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight"
)


@pytest.mark.parametrize(
    ("tensors", "base"),
    [
        ({KOHYA_KEY: (4, 2048)}, "SDXL"),
        ({KOHYA_KEY: (4, 768)}, "Stable Diffusion 1"),
        ({DIFFUSERS_KEY: (4, 2048)}, "SDXL"),
        ({DIFFUSERS_KEY: (4, 1024)}, "Stable Diffusion 2"),
        ({OLD_KEY: (4, 768)}, "Stable Diffusion 1"),
        ({DIFFUSERS_KEY: (4, 64)}, None),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768)},
         "Stable Diffusion 1"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)}, "SDXL"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}, "FLUX.1"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 3072)}, "FLUX.1"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072),
          "transformer.x_embedder.lora_A.weight": (4, 128)}, "FLUX.1 Control (Canny or Depth)"),
    ],
)  # fmt: skip
def test_header_tells_the_base(
    tensors: dict[str, tuple[int, ...]], base: str | None, tmp_path: Path
) -> None:
    save_file(header(**tensors), tmp_path / "lora.safetensors")
    assert check_lora(tmp_path / "lora.safetensors") == base


def test_lora_for_another_base_is_refused_by_its_header(tmp_path: Path) -> None:
    save_file(header(**{KOHYA_KEY: (4, 768)}), tmp_path / "old.safetensors")
    request = GenerationRequest("portrait", loras=[Lora(tmp_path / "old.safetensors")])
    inputs = open_inputs(request, sdxl().models)
    for preset, base in ((sdxl(), "SDXL"), (flux(), "FLUX.1"), (mini(), "the miniature")):
        message = f"old.safetensors is a LoRA for Stable Diffusion 1, and the base model is {base};"
        with pytest.raises(WeightsError, match=re.escape(message)):
            inputs.check(preset.models)
    LoraInput(tmp_path, 1.0, "SDXL").check(sdxl().models)


def cut(path: Path) -> None:
    save_file(header(**{KOHYA_KEY: (4, 768)}), path)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"film\.safetensors does not exist"),
        (cut, "damaged or cut short"),
        (
            lambda path: save_file(header(**{"id_encoder.x": (1,)}), path),
            r"is not a LoRA: it is a PhotoMaker adapter \(use --method photomaker\)",
        ),
        (
            lambda path: save_file(header(**{"lora_unet_a.hada_w1_a": (1, 1)}), path),
            "is a LoHa or LoKr of LyCORIS, which diffusers does not load",
        ),
        (
            lambda path: save_file(
                header(**{KOHYA_KEY: (1, 1), "lora_unet_a.dora_scale": (1,)}), path
            ),
            "is a DoRA of LyCORIS",
        ),
    ],
)
def test_unusable_files_are_named(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "film.safetensors"
    write(path)
    with pytest.raises(WeightsError, match=message):
        open_lora(Lora(path))


def test_hub_name_and_folder(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"someone/film is not installed; `pulid weights get som"
    ):
        open_lora(Lora("someone/film"))
    snapshot = cache / "models--someone--film" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    save_file(header(**{KOHYA_KEY: (4, 2048)}), snapshot / "film.safetensors")
    assert open_lora(Lora("someone/film")).path == snapshot / "film.safetensors"
    save_file(header(**{KOHYA_KEY: (4, 2048)}), snapshot / "other.safetensors")
    with pytest.raises(
        WeightsError, match=r"it holds film\.safetensors, other\.safetensors; name the file"
    ):
        open_lora(Lora(snapshot))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WeightsError, match=r"empty is not the folder of one LoRA: it holds none"):
        open_lora(Lora(empty))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(hub.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_selection_of_a_file() -> None:
    assert select_lora_file(["README.md", "film.safetensors", "images/1.png"]) == "film.safetensors"
    assert select_lora_file(["a.safetensors", "pytorch_lora_weights.safetensors"]) == (
        "pytorch_lora_weights.safetensors"
    )
    assert select_lora_file(["config.json", "film.safetensors"]) is None
    assert select_lora_file(["diffusion_pytorch_model.safetensors"]) is None
    assert select_lora_file(["checkpoint-500/film.safetensors"]) is None


@pytest.mark.parametrize("scale", [11, -11, float("nan"), float("inf")])
def test_scale_out_of_range(scale: float) -> None:
    with pytest.raises(OptionError, match=r"^loras\.0\.scale must be "):
        GenerationRequest("portrait", loras=[{"model": "film.safetensors", "scale": scale}])


def test_image_names_its_loras(studios: dict[str, Studio], folder: Path, tmp_path: Path) -> None:
    studio = studios["sdxl"]
    path = folder / "C:kohya 1.safetensors"
    model = studio.preset.selection
    request = GenerationRequest("portrait", loras=[Lora(path, 0.7)], model=model)
    result = studio.generate(request)
    (saved,) = result.save(tmp_path)
    stored = Provenance.read(saved)
    assert stored.required_files() == {"loras.0.model": "C:kohya 1.safetensors"}
    with pytest.raises(OptionError, match=r"was generated with C:kohya 1\.safetensors; pass loras"):
        stored.restore()
    again = stored.restore({"loras.0.model": path})
    assert again.loras == (Lora(path, 0.7),)
    assert np.array_equal(pixels(studio.generate(again).images[0]), pixels(result.images[0]))
    other = to_kohya(
        folder / "sdxl2" / "pytorch_lora_weights.safetensors", tmp_path / "b.safetensors"
    )
    with pytest.raises(OptionError, match="is not the file that"):
        stored.restore({"loras.0.model": other})


def test_no_loras_touch_nothing() -> None:
    with use_loras(object(), []):
        pass
