"""The style of another image on the miniature, with its own IP-Adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from openpulid.errors import OptionError, WeightsError
from openpulid.io.checkpoints import group_tensors, read_tensors
from openpulid.io.image_grid import to_pil
from openpulid.mini.train.baselines.ip_adapter import style as create_adapter
from openpulid.pipelines.presets import MINIATURE, mini, mini_lightning
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import StyleImage
from openpulid.pipelines.studio import Studio
from openpulid.world import Person, Scene, render
from tests.support.studios import assert_same_state, components_state, pixels

PROMPT = "portrait of a person"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's weights, without an IP-Adapter."""
    folder = tmp_path_factory.mktemp("weights")
    for path in MINIATURE.iterdir():
        if path.name != "style.safetensors":
            (folder / path.name).symlink_to(path, path.is_dir())
    return folder


@pytest.fixture(scope="module")
def untrained(weights: Path) -> Path:
    """A style image for a miniature whose IP-Adapter is not trained."""
    image = weights / "image.png"
    scene = Scene(style="pencil", background="white")
    to_pil(render([Person.from_seed(3)], [scene]).image)[0].save(image)
    return image


def test_missing_adapter_names_its_command(weights: Path, untrained: Path) -> None:
    request = GenerationRequest(PROMPT, style_image=StyleImage(untrained))
    message = "style_image needs the miniature's IP-Adapter, which is not trained yet; `pulid mini"
    for preset in (mini, mini_lightning):
        with pytest.raises(OptionError, match=message):
            preset(weights / "none").resolve(request)


@pytest.fixture(scope="module")
def studio(weights: Path, untrained: Path) -> Studio:
    """The miniature in four steps, with a random IP-Adapter."""
    from openpulid.pipelines.factory import load_adapter, load_extractor, load_pipeline

    preset, cpu = mini_lightning(weights), torch.device("cpu")
    preset = preset.with_defaults(guidance_scale=3.0)
    pipe = load_pipeline(preset, cpu)
    torch.manual_seed(0)
    baseline = create_adapter(pipe, 128)
    for name, weight in baseline.trained.named_parameters():
        if "to_v_ip" in name:  # zero before training
            torch.nn.init.normal_(weight, std=0.1)
    written = baseline.save(weights / "style", pipe)
    assert written == weights / "style.safetensors"
    return Studio(pipe, load_adapter(preset, cpu), load_extractor(preset, cpu), preset)


def diffusers_style(studio: Studio, weights: Path, image: Path, scale: float) -> np.ndarray:
    """Generate with diffusers alone, with the image processor of transformers."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(weights / "clip").float()
    processor = CLIPImageProcessor(size=96, crop_size=96)
    pipe = studio.pipe
    values = processor(Image.open(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        features = encoder(values).image_embeds[None]
    pipe.load_ip_adapter(
        group_tensors(read_tensors(weights / "style.safetensors")),
        subfolder="",
        weight_name="",
        image_encoder_folder=None,
    )
    pipe.set_ip_adapter_scale(scale)
    try:
        return pixels(
            pipe(
                PROMPT,
                width=96,
                height=96,
                num_inference_steps=4,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(5),
                ip_adapter_image_embeds=[torch.cat([torch.zeros_like(features), features])],
            ).images[0]
        )
    finally:
        pipe.unload_ip_adapter()


def test_style_is_that_of_diffusers(studio: Studio, weights: Path, untrained: Path) -> None:
    plain = GenerationRequest(PROMPT, seed=5)
    without = pixels(studio.generate(plain).images[0])
    before = components_state(studio.pipe)
    images = [
        pixels(
            studio.generate(
                plain.model_copy(update={"style_image": StyleImage(untrained, scale)})
            ).images[0]
        )
        for scale in (0.8, 0.0)
    ]
    assert_same_state(components_state(studio.pipe), before)
    assert np.array_equal(pixels(studio.generate(plain).images[0]), without)
    assert np.array_equal(images[1], without)
    expected = diffusers_style(studio, weights, untrained, 0.8)
    assert np.abs(images[0] - expected).max() <= 1
    assert np.abs(without - expected).max() > 10


def test_image_with_the_style_of_the_miniature_is_regenerated(
    studio: Studio, tmp_path: Path, untrained: Path
) -> None:
    result = studio.generate(GenerationRequest(PROMPT, style_image=StyleImage(untrained)))
    (saved,) = result.save(tmp_path)
    stored = Provenance.read(saved)
    assert stored.required_files() == {"style_image.image": "image.png"}
    again = stored.restore({"style_image.image": untrained})
    assert np.array_equal(pixels(studio.generate(again).images[0]), pixels(result.images[0]))


def test_adapter_of_another_base_is_refused(studio: Studio, weights: Path, untrained: Path) -> None:
    style = StyleImage(untrained, model=str(weights / "detector.safetensors"))
    with pytest.raises(WeightsError, match=r"detector\.safetensors is not an IP-Adapter"):
        studio.generate(GenerationRequest(PROMPT, style_image=style))
