"""The preset of Chroma: loading, options, guidance, and images that start from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from openpulid.errors import OptionError, PromptError, WeightsError
from openpulid.pipelines.factory import load_pipeline
from openpulid.pipelines.memory_levels import FLUX_LEVELS, stream_pipeline
from openpulid.pipelines.memory_prediction import predict_memory
from openpulid.pipelines.presets import chroma, flux
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import InitImage, Lora
from openpulid.pipelines.selection import with_base
from openpulid.pipelines.studio import Studio
from tests.support.people import anna
from tests.support.studios import SIDE, SIZE, chroma_studio, pixels
from tests.support.tiny_bases import fresh_adapter, tiny_base
from tests.support.tiny_flux import tiny_pipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def studio() -> Studio:
    return chroma_studio()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    tiny_base("Chroma").save_pretrained(folder / "chroma")
    tiny_pipe().save_pretrained(folder / "flux")
    return folder


def generate(studio: Studio, person: Any = anna, **options: Any) -> np.ndarray:
    return pixels(studio.generate("portrait", person, seed=5, **options).images[0])


def test_preset_has_the_defaults_of_its_pipeline() -> None:
    defaults = chroma().defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (35, 5.0)
    assert (defaults.width, defaults.height, defaults.max_sequence_length) == (1024, 1024, 512)
    assert chroma().published[:2] == ("chroma-base", "pulid-flux-v0.9.1")
    for option in ({"true_cfg_scale": 2.0}, {"timestep_to_start_cfg": 1}):
        with pytest.raises(OptionError, match="preset 'chroma' does not support"):
            chroma().resolve(GenerationRequest(prompt="portrait", **option))


def test_images_without_identity_are_diffusers_own(studio: Studio) -> None:
    expected = studio.pipe(
        "portrait",
        negative_prompt="of a person",
        width=SIDE,
        height=SIDE,
        num_inference_steps=4,
        guidance_scale=5.0,
        max_sequence_length=10,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.array_equal(generate(studio, None, negative_prompt="of a person"), pixels(expected))
    assert not np.array_equal(generate(studio, negative_prompt="of a person"), pixels(expected))


def test_options_reach_the_image(studio: Studio) -> None:
    different = [
        generate(studio),
        generate(studio, scale=0.3),
        generate(studio, start_step=2),
        generate(studio, guidance_scale=1.0),
        generate(studio, negative_prompt="person"),
    ]
    assert len({image.tobytes() for image in different}) == len(different)
    assert np.array_equal(generate(studio, start=0.5), different[2])
    assert np.array_equal(generate(studio, scale=0.0), generate(studio, None))


def test_images_start_from_an_image_and_a_mask(studio: Studio, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "init.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, SIDE // 2 :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    init = InitImage(image=str(tmp_path / "init.png"), strength=0.75)
    whole = generate(studio, init_image=init)
    assert not np.array_equal(whole, generate(studio, None, init_image=init))
    masked = init.model_copy(update={"mask": str(tmp_path / "mask.png")})
    part = generate(studio, init_image=masked)
    assert np.array_equal(part[:, : SIDE // 2], noise[:, : SIDE // 2].astype(int))
    assert not np.array_equal(part[:, SIDE // 2 :], noise[:, SIDE // 2 :].astype(int))


def test_lora_with_the_names_of_flux_is_loaded(studio: Studio, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    torch.manual_seed(0)
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, 32)}
    tensors[f"{layer}.lora_B.weight"] = torch.randn(32, 2)
    save_file(tensors, tmp_path / "style.safetensors")
    lora = Lora(model=str(tmp_path / "style.safetensors"))
    plain = generate(studio)
    assert not np.array_equal(generate(studio, loras=[lora]), plain)
    assert np.array_equal(generate(studio), plain)


def test_words_are_those_of_t5(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PromptError, match="zebra"):
        studio.generate("portrait of a zebra")
    studio.generate("a person " * 5)
    assert any("the prompt has 11 tokens and the model reads 10" in x for x in caplog.messages)


def test_pipelines_load_and_others_are_refused_by_name(folder: Path) -> None:
    pipe = load_pipeline(chroma(folder / "chroma"), CPU)
    assert (type(pipe).__name__, pipe.transformer.dtype) == ("ChromaPipeline", torch.bfloat16)
    with pytest.raises(
        WeightsError, match=r"for a Chroma preset: it is a FluxPipeline; use .*flux"
    ):
        load_pipeline(chroma(folder / "flux"), CPU)
    with pytest.raises(WeightsError, match=r"a FLUX preset: it is a ChromaPipeline; use .*chroma"):
        load_pipeline(flux(folder / "chroma"), CPU)


def test_a_transformer_alone_replaces_that_of_the_pipeline(folder: Path, tmp_path: Path) -> None:
    (file,) = (folder / "chroma" / "transformer").glob("*.safetensors")
    state = load_file(file)
    state["proj_out.bias"] = torch.full_like(state["proj_out.bias"], 3.0)
    save_file(state, tmp_path / "finetune.safetensors")
    preset = with_base(chroma(folder / "chroma"), tmp_path / "finetune.safetensors")
    pipe = load_pipeline(preset, CPU)
    assert bool((pipe.transformer.proj_out.bias == 3).all())
    (other,) = (folder / "flux" / "transformer").glob("*.safetensors")
    with pytest.raises(WeightsError, match=r"is no Chroma transformer; it is a FLUX\.1 transform"):
        load_pipeline(with_base(preset, other), CPU)
    with pytest.raises(WeightsError, match=r"is no FLUX\.1 transformer; .*--preset chroma"):
        load_pipeline(with_base(flux(folder / "flux"), tmp_path / "finetune.safetensors"), CPU)


@pytest.mark.parametrize("level", FLUX_LEVELS)
def test_memory_levels_give_the_same_images(level: str, folder: Path) -> None:
    """The 8-bit levels have the rounding of their weights."""
    images = []
    for memory in ("full", level):
        pipe = load_pipeline(chroma(folder / "chroma").with_models(memory=memory), CPU)
        embeds = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(1))
        images.append(
            pipe(
                prompt_embeds=embeds.bfloat16(),
                prompt_attention_mask=torch.ones(1, 7).bfloat16(),
                guidance_scale=1.0,
                width=SIDE,
                height=SIDE,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images.float()
        )
    change = float((images[1] - images[0]).norm() / images[0].norm())
    assert change < (0.1 if FLUX_LEVELS[level].network == "fp8" else 1e-6)


def test_streaming_gives_the_same_image() -> None:
    """With the CPU at both ends, and a single text encoder."""
    pipe = tiny_base("Chroma")
    adapter = fresh_adapter(pipe)

    def image() -> bytes:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "max_sequence_length": 10, **SIZE}
        with adapter.use(anna):
            return pipe("portrait", generator=generator, **options).images[0].tobytes()

    before = image()
    stream_pipeline(pipe, CPU)
    assert any(hasattr(part, "_diffusers_hook") for part in pipe.text_encoder.modules())
    assert image() == before


def test_predicted_memory_is_that_of_fewer_weights() -> None:
    """Chroma has 8.9 billion weights in its transformer, FLUX.1 has 11.9, and no CLIP."""
    chroma_parts, flux_parts = (
        predict_memory("full", 1024, 1024, 512, family)[0].parts for family in ("chroma", "flux")
    )
    difference = {name: flux_parts[name] - chroma_parts[name] for name in chroma_parts}
    assert difference.pop("transformer") == pytest.approx(6.0e9, rel=0.01)
    assert difference.pop("text encoders") == pytest.approx(0.25e9, rel=0.05)
    assert not any(difference.values())
