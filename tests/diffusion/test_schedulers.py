"""The scheduler takes a pipeline along the very steps of the samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image

from openpulid.diffusion.sampling import dpmpp_2m, dpmpp_sde
from openpulid.diffusion.schedulers import KarrasScheduler
from openpulid.errors import OptionError


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    sigma = sigma.view(-1, 1, 1, 1)
    return x / (1 + sigma**2) * 0.9 + 0.05 * torch.sin(3 * x)


def walk(
    scheduler: KarrasScheduler, noise: torch.Tensor, steps: int, generator=None
) -> torch.Tensor:
    """What a pipeline does, with a network that knows the denoiser."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.levels[i]
        seen = scheduler.scale_model_input(x, t)
        torch.testing.assert_close(seen, x / (sigma**2 + 1).sqrt())
        wanted = denoise(x, sigma.expand(len(x)))
        if scheduler.config.prediction_type == "epsilon":
            output = (x - wanted) / sigma
        else:
            output = (x / (sigma**2 + 1) - wanted) * (sigma**2 + 1).sqrt() / sigma
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_2m_is_the_sampler(steps: int, prediction: str) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = KarrasScheduler(prediction_type=prediction)
    made = walk(scheduler, noise, steps)
    torch.testing.assert_close(
        made, dpmpp_2m(denoise, noise * scheduler.sigmas[0], scheduler.sigmas), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        walk(scheduler, noise, steps), made
    )  # nothing is left of the run before


def test_2m_is_the_reference(golden) -> None:
    scheduler = KarrasScheduler()
    assert (
        golden.error(
            "sampler.dpmpp_2m.25", walk(scheduler, golden.input("sampler.x", 1, 4, 8, 8), 25)
        )
        < 1e-4
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sde_is_the_sampler_and_noise_is_the_requests(steps: int) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = KarrasScheduler(algorithm="dpmpp_sde")
    made = walk(scheduler, noise, steps, torch.Generator().manual_seed(7))
    own = torch.Generator().manual_seed(7)
    expected = dpmpp_sde(
        denoise,
        noise * scheduler.sigmas[0],
        scheduler.sigmas,
        lambda: torch.randn(noise.shape, generator=own),
    )
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert len(scheduler.timesteps) == 2 * steps - 1
    two = walk(
        scheduler,
        noise.expand(2, -1, -1, -1),
        steps,
        [torch.Generator().manual_seed(s) for s in (7, 8)],
    )
    torch.testing.assert_close(two[:1], made)
    assert steps == 1 or not torch.allclose(two[1:], made)


def test_times_are_the_nearest_trained_ones() -> None:
    scheduler = KarrasScheduler()
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999 and scheduler.timesteps[-1] == 0
    assert (scheduler.timesteps.diff() <= 0).all()
    with pytest.raises(OptionError, match="dpmpp_2m, dpmpp_sde"):
        KarrasScheduler(algorithm="magic")


def test_noise_over_a_picture() -> None:
    scheduler = KarrasScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    picture, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 2.0)
    noisy = scheduler.add_noise(picture, noise, scheduler.timesteps[4:5].repeat(2))
    torch.testing.assert_close(noisy, 1 + 2 * scheduler.sigmas[4] * torch.ones(2, 1, 2, 2))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("algorithm", ["dpmpp_2m", "dpmpp_sde"])
def test_inpainting_restores_the_rest_at_the_level_of_each_step(
    tiny_pipeline: Any, algorithm: str, strength: float
) -> None:
    scheduler = KarrasScheduler(algorithm=algorithm)
    pipe = StableDiffusionXLInpaintPipeline(
        **{**tiny_pipeline().components, "scheduler": scheduler}
    )
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    kept: list[torch.Tensor] = []

    def note(pipe: Any, i: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        kept.append(state["latents"][..., 4:].clone())
        return {}

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))[
        ..., 4:
    ]  # the request's first draw
    options = {
        "num_inference_steps": 5,
        "strength": strength,
        "generator": torch.Generator().manual_seed(7),
    }
    size = {"width": 16, "height": 16, "output_type": "latent"}
    pipe("portrait", image=latents, mask_image=mask, callback_on_step_end=note, **options, **size)
    picture, levels = latents[..., 4:], [*scheduler.levels[-len(kept) + 1 :], torch.tensor(0.0)]
    assert len(kept) == (5 if strength == 1 else 3) * scheduler.order - (scheduler.order - 1)
    for seen, level in zip(kept, levels, strict=True):
        torch.testing.assert_close(seen, picture + level * noise)


def test_a_run_from_a_picture_leaves_nothing_to_the_next() -> None:
    """Not every pipeline says where it begins: ControlNet's does not."""
    scheduler = KarrasScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(walk(scheduler, noise, 5), walk(KarrasScheduler(), noise, 5))
