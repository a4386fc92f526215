"""An IP-Adapter next to PuLID, compared with diffusers' `load_ip_adapter`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from openpulid.errors import OptionError, WeightsError
from openpulid.io import hub
from openpulid.pipelines.inputs import open_inputs
from openpulid.pipelines.memory_levels import SDXL_LEVELS, place_pipeline, stream_pipeline
from openpulid.pipelines.presets import flux, mini, mini_flux, sdxl
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import InitImage, Lora, Person, StyleImage
from openpulid.pipelines.selection import with_method
from openpulid.pipelines.studio import Studio
from tests.support.clip_files import SEEN, plain, plus, tower
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

FILES = {"ip-adapter": plain, "ip-adapter-plus": plus}


@pytest.fixture(scope="module")
def studio(tiny_pipeline: Any) -> Studio:
    return sdxl_studio(tiny_pipeline())


@pytest.fixture
def folder(tmp_path: Path, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files with the names of the published weights, a style and a person."""
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, build in FILES.items():
        path = tmp_path / hub.WEIGHTS[name].file
        path.parent.mkdir(exist_ok=True)
        parts = build(studio.pipe.unet)
        tensors = {f"{part}.{key}": x for part, named in parts.items() for key, x in named.items()}
        save_file(tensors, path)
    encoder = tmp_path / hub.WEIGHTS["clip-h"].file
    encoder.parent.mkdir(parents=True)
    save_file({name: x.contiguous() for name, x in tower().state_dict().items()}, encoder)
    # of the size that the vision encoder reads
    values = np.random.default_rng(0).integers(0, 255, (8, 8, 3))
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "style.png")
    anna.save(tmp_path / "anna.safetensors")
    return tmp_path


def style_embeds(folder: Path, name: str) -> torch.Tensor:
    """Encode the image as diffusers does, with the image processor of transformers."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size=8, crop_size=8)
    image = Image.open(folder / "style.png")
    values = processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        outputs = [
            tower()(x, output_hidden_states=True) for x in (torch.zeros_like(values), values)
        ]
    if name == "ip-adapter":
        features = [output.image_embeds for output in outputs]
        return torch.stack([torch.zeros_like(features[0]), features[1]])
    return torch.stack([output.hidden_states[-2] for output in outputs])


@pytest.mark.parametrize("name", FILES)
def test_style_next_to_an_identity_is_that_of_diffusers(
    name: str, studio: Studio, folder: Path
) -> None:
    person = Person(identity=folder / "anna.safetensors", scale=1.0)
    alone = GenerationRequest("portrait", seed=5, people=[person])
    without = pixels(studio.generate(alone).images[0])
    before = components_state(studio.pipe)
    style = StyleImage(folder / "style.png", 0.8, model=name)
    image = pixels(studio.generate(alone.model_copy(update={"style_image": style})).images[0])

    assert_same_state(components_state(studio.pipe), before)
    assert np.array_equal(pixels(studio.generate(alone).images[0]), without)
    studio.pipe.load_ip_adapter(
        FILES[name](studio.pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
    )
    studio.pipe.set_ip_adapter_scale(0.8)
    options = studio.preset.defaults.identity.model_dump(exclude_none=True)
    with studio.adapter.use(anna, pipe=studio.pipe, **{**options, "scale": 1.0}):
        expected = run_diffusers(studio, ip_adapter_image_embeds=[style_embeds(folder, name)])
    studio.pipe.unload_ip_adapter()
    assert np.abs(image - expected).max() <= 1
    assert np.abs(without - expected).max() > 2


@pytest.mark.parametrize("level", ["8gb", "6gb"])
def test_style_and_initial_image_at_a_memory_level(
    level: str, folder: Path, tiny_pipeline: Any
) -> None:
    """In 8 bits, where images differ a little, or streamed with the CPU at both ends."""
    cpu = torch.device("cpu")
    full, placed = sdxl_studio(tiny_pipeline()), sdxl_studio(tiny_pipeline())
    place_pipeline(placed.pipe, SDXL_LEVELS[level], cpu)
    if level == "6gb":
        stream_pipeline(placed.pipe, cpu)
    Image.linear_gradient("L").save(folder / "mask.png")
    style = StyleImage(folder / "style.png", 0.8)
    plain = pixels(full.generate(GenerationRequest("portrait", seed=5)).images[0])
    for fields in (
        {"style_image": style},
        {"init_image": InitImage(folder / "style.png", strength=0.8)},
        {"init_image": InitImage(folder / "style.png", 0.8, mask=folder / "mask.png")},
    ):
        request = GenerationRequest("portrait", seed=5, **fields)
        one, other = (pixels(studio.generate(request).images[0]) for studio in (full, placed))
        assert np.abs(one - plain).mean() > 1
        if level == "6gb":
            assert np.array_equal(one, other)
        else:
            assert 0 < np.abs(one - other).mean() < 0.5 * np.abs(one - plain).mean()


def test_style_with_a_lora_and_without_a_person(studio: Studio, folder: Path) -> None:
    from tests.pipelines.test_loras import save_lora

    lora = Lora(save_lora(type(studio.pipe)(**studio.pipe.components), folder / "lora"))
    studio.pipe.unload_lora_weights()
    style = StyleImage(folder / "style.png", 1.0)
    images = []
    for options in ({}, {"style_image": style}, {"style_image": style, "loras": [lora]}):
        request = GenerationRequest("(portrait:1.2)", **options)
        images.append(pixels(studio.generate(request).images[0]))
    assert min(np.abs(images[0] - images[1]).max(), np.abs(images[1] - images[2]).max()) > 2
    again = studio.generate(GenerationRequest("(portrait:1.2)")).images[0]
    assert np.array_equal(pixels(again), images[0])


def test_scale_of_zero_has_no_effect(studio: Studio, folder: Path) -> None:
    style = StyleImage(folder / "style.png", 0)
    request = GenerationRequest("portrait", seed=5, style_image=style)
    assert np.array_equal(pixels(studio.generate(request).images[0]), run_diffusers(studio))


def test_image_names_its_style(studio: Studio, folder: Path) -> None:
    model = studio.preset.selection
    request = GenerationRequest(
        "portrait", style_image=StyleImage(folder / "style.png"), model=model
    )
    result = studio.generate(request)
    (saved,) = result.save(folder)
    stored = Provenance.read(saved)
    assert stored.required_files() == {"style_image.image": "style.png"}
    again = stored.restore({"style_image.image": folder / "style.png"})
    assert np.array_equal(pixels(studio.generate(again).images[0]), pixels(result.images[0]))


def test_missing_weights_are_named_with_their_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(folder / "none"))
    request = GenerationRequest("portrait", style_image=StyleImage(folder / "style.png"))
    message = r"not installed: ip-adapter, clip-h; `pulid weights get ip-adapter clip-h` downloads"
    with pytest.raises(WeightsError, match=message):
        open_inputs(request, sdxl().models)


def test_other_kinds_of_files_are_refused(studio: Studio, folder: Path) -> None:
    style = StyleImage(folder / "style.png", model=str(folder / "anna.safetensors"))
    with pytest.raises(WeightsError, match=r"anna\.safetensors is not an IP-Adapter"):
        open_inputs(GenerationRequest("portrait", style_image=style), sdxl().models)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (mini, "style_image.model ip-adapter is not for the miniature, which has an IP-Adapter of"),
        (flux, "style_image.model ip-adapter is not for FLUX presets; use ip-adapter-flux."),
        (mini_flux, "preset 'mini-flux' does not support: style_image"),
        (
            lambda: with_method(sdxl(), "faceid"),
            "preset 'sdxl' with faceid does not support: style_image",
        ),
    ],
)
def test_models_without_a_style_image(preset: Callable[[], Any], message: str) -> None:
    style = StyleImage("style.png", model="ip-adapter")
    with pytest.raises(OptionError, match=message):
        preset().resolve(GenerationRequest("portrait", style_image=style))


@pytest.mark.parametrize(
    ("preset", "model"), [(sdxl, "ip-adapter"), (flux, "ip-adapter-flux")], ids=["sdxl", "flux"]
)
def test_default_adapter_is_that_of_the_base_model(preset: Callable[[], Any], model: str) -> None:
    request = GenerationRequest("portrait", style_image=StyleImage("style.png"))
    assert preset().resolve(request).style_image == StyleImage("style.png", model=model)


@pytest.fixture(scope="module")
def flux_pipe() -> Any:
    return tiny_pipe()


@pytest.fixture
def flux_folder(folder: Path, flux_pipe: Any) -> Path:
    """The folder with an IP-Adapter in the format of XLabs, and its vision encoder."""
    random = torch.Generator().manual_seed(3)
    width, cross = flux_pipe.transformer.inner_dim, flux_pipe.transformer.config.joint_attention_dim
    tensors = {
        "ip_adapter_proj_model.proj.weight": torch.randn(4 * cross, SEEN, generator=random),
        "ip_adapter_proj_model.proj.bias": torch.zeros(4 * cross),
        "ip_adapter_proj_model.norm.weight": torch.ones(cross),
        "ip_adapter_proj_model.norm.bias": torch.zeros(cross),
    }
    for block in range(flux_pipe.transformer.config.num_layers):
        for side in "kv":
            name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{side}_proj"
            tensors[f"{name}.weight"] = torch.randn(width, cross, generator=random)
            tensors[f"{name}.bias"] = torch.randn(width, generator=random)
    save_file(tensors, folder / hub.WEIGHTS["ip-adapter-flux"].file)
    encoder = {name: x.contiguous() for name, x in tower().state_dict().items()}
    weight = hub.WEIGHTS["clip-l"]
    (folder / weight.folder).mkdir()
    save_file(encoder, folder / weight.folder / weight.file)
    return folder


@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_style_on_flux_is_that_of_diffusers(
    true_cfg: float, flux_pipe: Any, flux_folder: Path
) -> None:
    studio = flux_studio(flux_pipe)
    negative = None if true_cfg == 1 else "person"
    person = Person(identity=flux_folder / "anna.safetensors")
    alone = GenerationRequest(
        "portrait", negative, seed=5, people=[person], true_cfg_scale=true_cfg, num_images=2
    )
    without = [pixels(image) for image in studio.generate(alone).images]
    before = components_state(flux_pipe)
    style = StyleImage(flux_folder / "style.png", 0.8, model="ip-adapter-flux")
    styled = alone.model_copy(update={"style_image": style})
    images = [pixels(image) for image in studio.generate(styled).images]
    batch = [pixels(image) for image in studio.generate(styled, batch_size=2).images]
    assert_same_state(components_state(flux_pipe), before)
    again = [pixels(image) for image in studio.generate(alone).images]
    assert all(map(np.array_equal, again, without))
    assert max(np.abs(a - b).max() for a, b in zip(images, batch, strict=True)) <= 1

    embeds = style_embeds(flux_folder, "ip-adapter")
    with torch.no_grad():
        black = tower()(normalized_black()).image_embeds[None]
    flux_pipe.load_ip_adapter(
        str(flux_folder),
        weight_name=hub.WEIGHTS["ip-adapter-flux"].file,
        image_encoder_pretrained_model_name_or_path=None,
    )
    flux_pipe.set_ip_adapter_scale(0.8)
    with studio.adapter.use(anna, pipe=flux_pipe, timestep_to_start_cfg=1 if negative else 0):
        expected = run_diffusers(
            studio,
            negative_prompt=negative,
            true_cfg_scale=true_cfg,
            ip_adapter_image_embeds=[embeds[1:]],
            negative_ip_adapter_image_embeds=[black],
        )
    flux_pipe.unload_ip_adapter()
    assert np.abs(images[0] - expected).max() <= 1
    assert np.abs(images[0] - without[0]).max() > 2


def normalized_black() -> torch.Tensor:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size=8, crop_size=8)
    return processor(Image.new("RGB", (8, 8)), return_tensors="pt").pixel_values


def test_style_on_flux_needs_full_memory() -> None:
    preset = flux().with_models(memory="24gb")
    request = GenerationRequest(
        "portrait", style_image=StyleImage("a.png", model="ip-adapter-flux")
    )
    with pytest.raises(OptionError, match="style_image cannot be used with memory 24gb; use full"):
        preset.resolve(request)
