"""The callback of a generation, and what a studio tells of its images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpulid.diffusion.schedulers import KarrasScheduler
from openpulid.errors import FaceError, Stopped
from openpulid.pipelines.loading import load
from openpulid.pipelines.preview import NoisyLatents, decode_preview
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.studio import Studio
from openpulid.world.gallery import render_portrait
from tests.support.studios import flux_studio
from tests.support.tiny_flux import tiny_pipe

Preview = Callable[[], Image.Image]


@pytest.fixture(scope="module")
def studio() -> Studio:
    return load("mini", device="cpu")


def distance(one: Image.Image, other: Image.Image) -> float:
    side = (32, 32)
    pixels = [np.asarray(image.resize(side), np.float32) for image in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


def test_steps_are_counted_over_all_images(studio) -> None:
    calls: list[tuple[int, int]] = []
    studio.generate(
        "portrait",
        num_images=3,
        num_inference_steps=2,
        batch_size=2,
        callback=lambda step, total, preview: calls.append((step, total)),
    )
    assert calls == [(2, 6), (4, 6), (5, 6), (6, 6)]


def test_an_initial_image_has_fewer_steps(studio, tmp_path) -> None:
    path = tmp_path / "gray.png"
    Image.new("RGB", (96, 96), "gray").save(path)
    calls: list[tuple[int, int]] = []
    studio.generate(
        "portrait",
        init_image={"image": path, "strength": 0.5},
        num_inference_steps=4,
        callback=lambda step, total, preview: calls.append((step, total)),
    )
    assert calls == [(1, 2), (2, 2)]


def test_previews_approach_the_image(studio) -> None:
    previews: list[Image.Image] = []
    result = studio.generate(
        "portrait, smiling",
        seed=3,
        num_inference_steps=8,
        callback=lambda step, total, preview: previews.append(preview()),
    )
    distances = [distance(preview, result.images[0]) for preview in previews]
    assert distances[-1] < 1
    assert distances[3] < 0.5 * distances[0]
    without = studio.generate("portrait, smiling", seed=3, num_inference_steps=8)
    assert without.images[0].tobytes() == result.images[0].tobytes()


def test_stopping_keeps_the_finished_images(studio) -> None:
    def stop(step: int, total: int, preview: Preview) -> None:
        if step == 4:
            raise Stopped

    result = studio.generate("portrait", seed=5, num_images=3, num_inference_steps=3, callback=stop)
    assert result.seeds == [5]
    assert len(studio.generate("portrait", num_inference_steps=1).images) == 1


@pytest.mark.parametrize("algorithm", ["dpmpp_2m", "dpmpp_sde"])
def test_the_first_preview_of_a_denoised_image_is_that_image(algorithm: str) -> None:
    """A network that predicts the true noise leads to the clean latents in every step."""
    scheduler = KarrasScheduler(algorithm=algorithm)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 4, 8, 8, generator=generator)
    latents = clean + scheduler.init_noise_sigma * torch.randn(1, 4, 8, 8, generator=generator)
    previous: NoisyLatents | None = None
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        sigma = scheduler.levels[scheduler.step_index]
        noise = (latents - clean) / sigma
        options: dict[str, Any] = {"generator": generator, "return_dict": False}
        latents = scheduler.step(noise, timestep, latents, **options)[0]
        noisy = NoisyLatents.read(scheduler, latents)
        estimate = noisy.estimate_clean(previous)
        if previous is not None and algorithm == "dpmpp_2m":
            assert torch.allclose(estimate, clean, atol=1e-3)
        previous = noisy
    assert torch.allclose(estimate, clean, atol=1e-3)


def test_similarity_finds_the_person(studio, tmp_path) -> None:
    anna, ben = (render_portrait(seed, 96) for seed in (1_000_007, 1_000_008))
    identity = studio.identify(anna)
    assert studio.similarity(anna, identity) == pytest.approx(1, abs=1e-4)
    assert studio.similarity(ben, identity) < 0.6
    path = identity.save(tmp_path / "anna.safetensors")
    image = studio.generate("portrait", identity=identity, scale=1.0).images[0]
    similarity = studio.similarity(image, path)
    assert similarity == pytest.approx(studio.similarity(image, anna), abs=1e-5)
    assert similarity > studio.similarity(image, ben)
    with pytest.raises(FaceError, match="no face"):
        studio.similarity(Image.new("RGB", (96, 96), "black"), identity)


def test_a_notebook_shows_the_images(studio) -> None:
    shown = studio.generate("portrait", seed=4, num_images=2, num_inference_steps=1)._repr_html_()
    assert shown.count("<img") == 2 and "seed 5" in shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_previews_on_flux_approach_the_image(dtype: torch.dtype) -> None:
    studio = flux_studio(tiny_pipe().to(dtype=dtype))
    previews: list[Image.Image] = []
    request = GenerationRequest("portrait", width=48, height=32, num_inference_steps=3)
    result = studio.generate(
        request, callback=lambda step, total, preview: previews.append(preview())
    )
    assert [preview.size for preview in previews] == [(48, 32)] * 3
    distances = [distance(preview, result.images[0]) for preview in previews]
    assert distances[-1] < 1 < distances[0]


def test_preview_of_a_half_precision_autoencoder_is_decoded_in_float32(tiny_pipeline) -> None:
    pipe = tiny_pipeline()
    pipe.vae.register_to_config(force_upcast=True)
    latents = 30_000 * torch.ones(1, 4, 8, 8)  # overflows in float16
    expected = decode_preview(pipe, latents, (16, 16))
    pipe.vae.to(torch.float16)
    assert distance(decode_preview(pipe, latents, (16, 16)), expected) < 2
    assert pipe.vae.dtype == torch.float16
