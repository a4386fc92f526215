"""The preset of FLUX.2 klein: options, images, loading, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from openpulid.errors import OptionError, WeightsError
from openpulid.pipelines.factory import check_models, load_pipeline
from openpulid.pipelines.memory_levels import FLUX_LEVELS
from openpulid.pipelines.memory_prediction import KLEIN_TRANSFORMER, predict_memory, weight_sizes
from openpulid.pipelines.presets import chroma, flux2_klein
from openpulid.pipelines.prompts import count_template_tokens
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Lora
from openpulid.pipelines.selection import with_base
from openpulid.pipelines.studio import Studio
from openpulid.pipelines.weights import find_next_command
from tests.support.flux2_names import original_names
from tests.support.people import anna, ben
from tests.support.studios import SIDE, klein_studio, pixels
from tests.support.tiny_bases import flux2_with_text
from tests.support.tiny_flux import tiny_pipe, tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def studio() -> Studio:
    return klein_studio()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    flux2_with_text().save_pretrained(folder / "klein")
    flux2_with_text(is_distilled=False).save_pretrained(folder / "klein-base")
    tiny_pipe().save_pretrained(folder / "flux")
    return folder


def generate(studio: Studio, person: Any = anna, **options: Any) -> np.ndarray:
    return pixels(studio.generate("portrait", person, seed=5, **options).images[0])


def test_preset_has_the_options_of_the_distilled_model() -> None:
    preset = flux2_klein()
    defaults = preset.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (4, None)
    assert (defaults.width, defaults.height, defaults.max_sequence_length) == (1024, 1024, 512)
    assert preset.published[0] == "flux2-klein-distilled"
    ignored = {"guidance_scale": 2.0, "negative_prompt": "blurry", "true_cfg_scale": 2.0}
    for option in ignored.items():
        with pytest.raises(OptionError, match="preset 'flux2-klein' does not support"):
            preset.resolve(GenerationRequest(prompt="portrait", **dict([option])))
    for edit in ({"init_image": {"image": "room.png"}}, {"refine_faces": {}}):
        with pytest.raises(OptionError, match=r"is not supported on FLUX\.2; leave it out"):
            preset.resolve(GenerationRequest(prompt="portrait", **edit))


def test_a_missing_adapter_is_said_before_missing_weights() -> None:
    preset = flux2_klein()
    with pytest.raises(OptionError, match=r"nobody has published a PuLID for FLUX\.2; train one "):
        check_models(preset)
    assert find_next_command(preset) == "pulid weights get flux2-klein"


def test_a_complete_preset_still_needs_an_adapter(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "any.safetensors"
    file.write_bytes(b"")
    names = ("detector", "recognition", "vision_encoder", "face_parsing")
    faces: dict[str, Any] = dict.fromkeys(names, file)
    preset = flux2_klein(folder / "klein").with_models(**faces)
    assert find_next_command(preset) == "pulid train flux2_klein_stage1"
    assert find_next_command(preset.with_models(adapter=file)) is None


def test_images_without_identity_are_diffusers_own(studio: Studio) -> None:
    expected = studio.pipe(
        prompt="portrait",
        width=SIDE,
        height=SIDE,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=10,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.array_equal(generate(studio, None), pixels(expected))
    assert np.array_equal(generate(studio, scale=0.0), pixels(expected))
    assert not np.array_equal(generate(studio), pixels(expected))
    assert np.array_equal(generate(studio, None), pixels(expected))


def test_options_reach_the_image(studio: Studio) -> None:
    left, right = np.zeros((2, SIDE, SIDE), np.uint8)
    left[:, : SIDE // 2] = 255
    right[:, SIDE // 2 :] = 255
    one, other = Image.fromarray(left), Image.fromarray(right)
    different = [
        generate(studio),
        generate(studio, ben),
        generate(studio, scale=0.3),
        generate(studio, start_step=2),
        generate(studio, end=0.5),
        generate(studio, [(anna, one)]),
        generate(studio, [(anna, one), (ben, other)]),
        generate(studio, [(ben, one), (anna, other)]),
    ]
    assert len({image.tobytes() for image in different}) == len(different)
    assert np.array_equal(generate(studio, start=0.5), different[3])


def test_every_image_has_a_seed_of_its_own(studio: Studio) -> None:
    alone = generate(studio)
    pair = studio.generate("portrait", anna, seed=4, num_images=2).images
    assert np.array_equal(pixels(pair[1]), alone)
    batch = studio.generate("portrait", anna, seed=4, num_images=2, batch_size=2).images
    assert np.abs(pixels(batch[1]) - alone).max() <= 1
    assert not np.array_equal(pixels(batch[0]), pixels(batch[1]))


def test_preview_of_the_last_step_is_the_image(studio: Studio) -> None:
    previews = []

    def show(step: int, total: int, preview: Any) -> None:
        previews.append(preview())

    image = studio.generate("portrait", anna, seed=5, callback=show).images[0]
    assert len(previews) == 4
    assert np.abs(pixels(previews[-1]) - pixels(image)).max() <= 1
    assert not np.array_equal(pixels(previews[0]), pixels(image))


def test_lora_is_loaded_and_removed(studio: Studio, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    torch.manual_seed(0)
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, 32)}
    tensors[f"{layer}.lora_B.weight"] = torch.randn(32, 2)
    save_file(tensors, tmp_path / "style.safetensors")
    lora = Lora(model=str(tmp_path / "style.safetensors"))
    plain = generate(studio)
    assert not np.array_equal(generate(studio, loras=[lora]), plain)
    assert np.array_equal(generate(studio), plain)


def test_a_chat_template_counts_as_text(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    assert count_template_tokens(tokenizer()) == 0
    reader = tokenizer()
    reader.chat_template = "portrait of {{ messages[0]['content'] }} a person"
    assert count_template_tokens(reader) == 4
    studio.generate("a person " * 5)
    assert any("the prompt has 11 tokens and the model reads 10" in x for x in caplog.messages)


def test_pipelines_load_and_others_are_refused_by_name(folder: Path) -> None:
    pipe = load_pipeline(flux2_klein(folder / "klein"), CPU)
    assert (type(pipe).__name__, pipe.transformer.dtype) == ("Flux2KleinPipeline", torch.bfloat16)
    with pytest.raises(WeightsError, match="is not distilled: it needs about 50 steps and guid"):
        load_pipeline(flux2_klein(folder / "klein-base"), CPU)
    with pytest.raises(WeightsError, match=r"a FLUX\.2 preset: it is a FluxPipeline; use .*flux"):
        load_pipeline(flux2_klein(folder / "flux"), CPU)
    with pytest.raises(WeightsError, match="a Flux2KleinPipeline; use --preset flux2-klein"):
        load_pipeline(chroma(folder / "klein"), CPU)


def test_a_transformer_alone_replaces_that_of_the_pipeline(folder: Path, tmp_path: Path) -> None:
    (file,) = (folder / "klein" / "transformer").glob("*.safetensors")
    state = load_file(file)
    state["proj_out.weight"] = torch.full_like(state["proj_out.weight"], 3.0)
    save_file(state, tmp_path / "finetune.safetensors")
    preset = with_base(flux2_klein(folder / "klein"), tmp_path / "finetune.safetensors")
    pipe = load_pipeline(preset, CPU)
    assert bool((pipe.transformer.proj_out.weight == 3).all())
    (other,) = (folder / "flux" / "transformer").glob("*.safetensors")
    with pytest.raises(WeightsError, match=r"is no FLUX\.2 transformer; it is a FLUX\.1 transform"):
        load_pipeline(with_base(preset, other), CPU)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_names_are_read(prefix: str, folder: Path, tmp_path: Path) -> None:
    (file,) = (folder / "klein" / "transformer").glob("*.safetensors")
    state = load_file(file)
    tensors = {f"{prefix}{name}": x for name, x in original_names(state).items()}
    save_file(tensors, tmp_path / "original.safetensors")
    preset = with_base(flux2_klein(folder / "klein"), tmp_path / "original.safetensors")
    loaded = load_pipeline(preset, CPU, torch.float32).transformer.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], x) for name, x in state.items())


@pytest.mark.parametrize("level", FLUX_LEVELS)
def test_memory_levels_give_the_same_images(level: str, folder: Path) -> None:
    """The 8-bit levels have the rounding of their weights."""
    images = []
    for memory in ("full", level):
        pipe = load_pipeline(flux2_klein(folder / "klein").with_models(memory=memory), CPU)
        latents = pipe(
            prompt="portrait",
            guidance_scale=1.0,
            width=SIDE,
            height=SIDE,
            num_inference_steps=2,
            max_sequence_length=10,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        images.append(latents.images.float())
    change = float((images[1] - images[0]).norm() / images[0].norm())
    assert change < (0.1 if FLUX_LEVELS[level].network == "fp8" else 1e-6)


def test_predicted_memory_is_that_of_the_published_files() -> None:
    """Their sizes on the hub: 7.75 GB of the transformer, 8.05 GB of the text encoder."""
    sizes = weight_sizes("flux2")
    assert sizes["transformer"] == pytest.approx(7.75e9, rel=0.001)
    assert sizes["text"] == pytest.approx(8.05e9, rel=0.001)
    phases = predict_memory("full", 1024, 1024, 512, "flux2")
    assert {phase.phase for phase in phases} == {"text", "steps", "decode"}
    assert max(phase.total for phase in phases) < predict_memory("full", family="flux")[0].total
    assert KLEIN_TRANSFORMER["num_layers"] == 5
