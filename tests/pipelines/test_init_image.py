"""Image-to-image and inpainting, next to diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image

from openpulid.errors import OptionError
from openpulid.pipelines.init_image import InitImageInput
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import MINIATURE, flux, mini, sdxl
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import InitImage, Person
from openpulid.pipelines.studio import Studio
from tests.support.people import anna
from tests.support.people import fresh as fresh_sdxl
from tests.support.studios import sdxl_studio as sdxl_studio_of
from tests.support.tiny_flux import fresh as fresh_flux
from tests.support.tiny_flux import tiny_pipe
from tests.support.versions import same_noise_in_every_precision

SIDE = 32


class UnusedExtractor:
    """Extractor of a studio that receives identities alone."""

    models = anna.models


@pytest.fixture(scope="module")
def sdxl_studio(tiny_pipeline: Any) -> Studio:
    pipe = tiny_pipeline()
    models: dict[str, Any] = {"use_half_precision": False, "size_multiple": 8, "min_side": 8}
    preset = sdxl().with_models(**models, native_side=SIDE, sampler=None)
    preset = preset.with_defaults(num_inference_steps=4, guidance_scale=3.0, negative_prompt="")
    return Studio(pipe, fresh_sdxl(pipe), UnusedExtractor(), preset)


@pytest.fixture(scope="module")
def flux_studio() -> Studio:
    pipe = tiny_pipe()
    models: dict[str, Any] = {"use_half_precision": False, "size_multiple": 4, "min_side": 4}
    preset = flux().with_models(**models, native_side=SIDE)
    preset = preset.with_defaults(num_inference_steps=4, max_sequence_length=10)
    return Studio(pipe, fresh_flux(pipe), UnusedExtractor(), preset)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(folder / "room.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[8:24, 16:] = 255
    Image.fromarray(mask).save(folder / "sofa.png")
    anna.save(folder / "anna.safetensors")
    return folder


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def run_diffusers(cls: Any, studio: Studio, folder: Path, **options: Any) -> np.ndarray:
    pipe = cls(**studio.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    if "XL" in cls.__name__:
        options |= {"negative_prompt": "", "guidance_scale": 3.0}
    else:
        options |= {"max_sequence_length": 10, "guidance_scale": 4.0}
    if "Img2Img" not in cls.__name__ or "Flux" in cls.__name__:
        options |= {"width": SIDE, "height": SIDE}
    return pixels(
        pipe(
            prompt="portrait",
            image=Image.open(folder / "room.png"),
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(5),
            **options,
        ).images[0]
    )


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_image_to_image_is_that_of_diffusers(
    family: str, sdxl_studio: Studio, flux_studio: Studio, folder: Path
) -> None:
    studio, cls = {
        "sdxl": (sdxl_studio, StableDiffusionXLImg2ImgPipeline),
        "flux": (flux_studio, FluxImg2ImgPipeline),
    }[family]
    init = InitImage(folder / "room.png", strength=0.5)
    request = GenerationRequest("portrait", seed=5, init_image=init)
    plain = studio.generate(request).images[0]
    assert plain.size == (SIDE, SIDE)
    expected = run_diffusers(cls, studio, folder, strength=0.5)
    assert np.array_equal(pixels(plain), expected)
    person = Person(identity=folder / "anna.safetensors", scale=1.0)
    shown = studio.generate(request.model_copy(update={"people": (person,)})).images[0]
    assert np.abs(pixels(shown) - expected).max() > 2
    assert np.array_equal(pixels(studio.generate(request).images[0]), expected)
    two = request.model_copy(update={"seed": 4, "num_images": 2})
    both = studio.generate(two, batch_size=2)
    assert np.abs(pixels(both.images[1]) - expected).max() <= 2


def test_exchanged_scheduler_also_runs_from_an_image(tiny_pipeline: Any, folder: Path) -> None:
    studio = sdxl_studio_of(tiny_pipeline())
    init = InitImage(folder / "room.png", strength=0.5)
    request = GenerationRequest("portrait", seed=5, init_image=init)
    before = pixels(studio.generate(request).images[0])
    studio.pipe.scheduler = DDIMScheduler.from_config(studio.pipe.scheduler.config)
    after = pixels(studio.generate(request).images[0])
    assert np.abs(after - before).max() > 2
    cls = StableDiffusionXLImg2ImgPipeline
    assert np.array_equal(after, run_diffusers(cls, studio, folder, strength=0.5))


@pytest.mark.parametrize(("strength", "steps"), [(0.2, 1), (0.6, 3), (1.0, 4)])
def test_steps_from_an_image_on_flux_are_those_of_diffusers(
    flux_studio: Studio, folder: Path, strength: float, steps: int
) -> None:
    init = InitImage(folder / "room.png", strength=strength)
    calls = []
    request = GenerationRequest("portrait", seed=5, init_image=init)
    flux_studio.generate(request, callback=lambda done, total, _: calls.append((done, total)))
    assert calls == [(done + 1, steps) for done in range(steps)]


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_inpainting_is_that_of_diffusers_inside_and_the_image_outside(
    family: str, sdxl_studio: Studio, flux_studio: Studio, folder: Path
) -> None:
    studio, cls = {
        "sdxl": (sdxl_studio, StableDiffusionXLInpaintPipeline),
        "flux": (flux_studio, FluxInpaintPipeline),
    }[family]
    init = InitImage(folder / "room.png", strength=0.75, mask=folder / "sofa.png")
    result = studio.generate(GenerationRequest("portrait", seed=5, init_image=init))
    image = pixels(result.images[0])
    mask = np.asarray(Image.open(folder / "sofa.png")) > 0
    expected = run_diffusers(
        cls, studio, folder, strength=0.75, mask_image=Image.open(folder / "sofa.png")
    )
    assert np.array_equal(image[mask], expected[mask])
    room = pixels(Image.open(folder / "room.png"))
    assert np.array_equal(image[~mask], room[~mask])
    assert np.abs(image[mask] - room[mask]).max() > 2
    both = studio.generate(
        GenerationRequest("portrait", seed=4, num_images=2, init_image=init), batch_size=2
    )
    assert np.abs(pixels(both.images[1]) - image).max() <= 2


@same_noise_in_every_precision
def test_inpainting_in_bfloat16(sdxl_studio: Studio, tiny_pipeline: Any, folder: Path) -> None:
    init = InitImage(folder / "room.png", strength=0.75, mask=folder / "sofa.png")
    person = Person(identity=folder / "anna.safetensors")
    request = GenerationRequest("portrait", seed=5, people=[person], init_image=init)
    pipe = tiny_pipeline().to(torch.bfloat16)
    half = Studio(pipe, fresh_sdxl(pipe), UnusedExtractor(), sdxl_studio.preset)
    mask = np.asarray(Image.open(folder / "sofa.png")) > 0
    images = [pixels(studio.generate(request).images[0]) for studio in (half, sdxl_studio)]
    assert np.array_equal(images[0][~mask], images[1][~mask])
    assert 0 < np.abs(images[0] - images[1])[mask].mean() < 8


def test_request_is_stored_with_its_files(
    sdxl_studio: Studio, folder: Path, tmp_path: Path
) -> None:
    init = InitImage(folder / "room.png", mask=folder / "sofa.png", resize="stretch")
    model = sdxl_studio.preset.selection
    result = sdxl_studio.generate(GenerationRequest("portrait", init_image=init, model=model))
    (path,) = result.save(tmp_path)
    stored = Provenance.read(path)
    names = {"init_image.image": "room.png", "init_image.mask": "sofa.png"}
    assert stored.required_files() == names
    again = stored.restore({field: folder / name for field, name in names.items()})
    assert np.array_equal(pixels(sdxl_studio.generate(again).images[0]), pixels(result.images[0]))


def test_miniature_paints_inside_the_mask(tmp_path: Path) -> None:
    """Its latents have 20 channels, which diffusers' inpainting pipeline refuses."""
    if not (MINIATURE / "pipeline").exists():
        pytest.skip("the miniature is not built")
    studio = load(mini().with_defaults(num_inference_steps=6), device="cpu")
    room = studio.generate("portrait of a person", seed=1).images[0]
    room.save(tmp_path / "room.png")
    mask = np.zeros((96, 96), np.uint8)
    mask[:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    init = InitImage(tmp_path / "room.png", strength=0.8, mask=tmp_path / "mask.png")
    image = studio.generate(GenerationRequest("portrait, sunglasses", seed=2, init_image=init))
    painted = pixels(image.images[0])
    assert np.array_equal(painted[48:], pixels(room)[48:])
    assert np.abs(painted[:48] - pixels(room)[:48]).mean() > 5


def test_sizes_and_resize_modes() -> None:
    models = sdxl().models
    assert InitImageInput(Image.new("RGB", (300, 200)), None).choose_size(models) == (1256, 840)
    assert InitImageInput(Image.new("RGB", (4000, 100)), None).choose_size(models) == (2048, 160)
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 16, 32))
    files = InitImageInput(image, Image.new("L", (8, 4), 0))
    crop = files.resize(32, 32, "crop")
    assert pixels(crop.image).min() == 255
    pad = files.resize(64, 64, "pad")
    assert pad.image.getpixel((32, 2)) == (127, 127, 127)
    assert pad.image.getpixel((60, 32)) == (255, 255, 255)
    assert pad.mask is not None
    assert pad.mask.getpixel((32, 2)) == 255 and pad.mask.getpixel((32, 32)) == 0
    stretch = files.resize(32, 32, "stretch")
    assert stretch.image.getpixel((1, 16)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("resize", "size", "is_noted"),
    [("pad", {}, True), ("crop", {}, False), ("pad", {"width": 32, "height": 24}, False)],
)
def test_resize_without_a_size_is_noted(
    sdxl_studio: Studio,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    resize: Any,
    size: dict[str, int],
    is_noted: bool,
) -> None:
    init = InitImage(folder / "room.png", resize=resize)
    sdxl_studio.generate(GenerationRequest("portrait", init_image=init, **size))
    assert ("resize pad has little effect without a size" in caplog.text) == is_noted


def test_strength_without_a_step_is_refused(sdxl_studio: Studio, folder: Path) -> None:
    init = InitImage(folder / "room.png", strength=0.2)
    request = GenerationRequest("portrait", init_image=init)
    with pytest.raises(OptionError, match=r"strength 0\.2 runs none of the 4 steps.*use 0\.25"):
        sdxl_studio.generate(request)


def test_identity_acts_in_the_steps_that_are_run(sdxl_studio: Studio, folder: Path) -> None:
    """Of 4 steps 2 are run, at 0 and at 0.5."""
    person = Person(identity=folder / "anna.safetensors")
    init = InitImage(folder / "room.png", strength=0.5)

    def image(**options: Any) -> np.ndarray:
        request = GenerationRequest.from_options(
            prompt="portrait", people=[person], init_image=init, **options
        )
        return pixels(sdxl_studio.generate(request).images[0])

    first, last, both = image(end=0.5), image(start=0.5), image()
    assert len({each.tobytes() for each in (first, last, both)}) == 3
    with pytest.raises(OptionError, match=r"none of the 2 steps is between start 0\.6 and end 1"):
        image(start=0.6)
