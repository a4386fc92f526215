"""The scheduler takes the same steps in a pipeline as the samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image

from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.diffusion.sampling import dpmpp_2m
from openpulid.diffusion.schedulers import KarrasScheduler
from openpulid.errors import OptionError
from tests.support.samplers import dpmpp_sde


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    sigma = sigma.view(-1, 1, 1, 1)
    return x / (1 + sigma**2) * 0.9 + 0.05 * torch.sin(3 * x)


def run_scheduler(
    scheduler: KarrasScheduler, noise: torch.Tensor, steps: int, generator=None
) -> torch.Tensor:
    """Sample like a pipeline, with a network that predicts exactly what the denoiser implies."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.levels[i]
        scaled = scheduler.scale_model_input(x, t)
        torch.testing.assert_close(scaled, x / (sigma**2 + 1).sqrt())
        denoised = denoise(x, sigma.expand(len(x)))
        if scheduler.config.prediction_type == "epsilon":
            output = (x - denoised) / sigma
        else:
            output = (x / (sigma**2 + 1) - denoised) * (sigma**2 + 1).sqrt() / sigma
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_2m_scheduler_matches_sampler(steps: int, prediction: str) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = KarrasScheduler(prediction_type=prediction)
    sample = run_scheduler(scheduler, noise, steps)
    torch.testing.assert_close(
        sample,
        dpmpp_2m(denoise, noise * scheduler.sigmas[0], scheduler.sigmas),
        atol=1e-4,
        rtol=1e-4,
    )
    torch.testing.assert_close(
        run_scheduler(scheduler, noise, steps), sample
    )  # no state of the first run is left


def test_2m_scheduler_matches_reference(golden) -> None:
    scheduler = KarrasScheduler()
    assert (
        golden.error(
            "sampler.dpmpp_2m.25",
            run_scheduler(scheduler, golden.input("sampler.x", 1, 4, 8, 8), 25),
        )
        < 1e-4
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sde_scheduler_matches_sampler_with_seeded_noise(steps: int) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = KarrasScheduler(algorithm="dpmpp_sde")
    sample = run_scheduler(scheduler, noise, steps, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    expected = dpmpp_sde(
        denoise,
        noise * scheduler.sigmas[0],
        scheduler.sigmas,
        lambda: torch.randn(noise.shape, generator=generator),
    )
    torch.testing.assert_close(sample, expected, atol=1e-4, rtol=1e-4)
    assert len(scheduler.timesteps) == 2 * steps - 1
    two = run_scheduler(
        scheduler,
        noise.expand(2, -1, -1, -1),
        steps,
        [torch.Generator().manual_seed(s) for s in (7, 8)],
    )
    torch.testing.assert_close(two[:1], sample)
    assert steps == 1 or not torch.allclose(two[1:], sample)


def test_timesteps_are_nearest_training_timesteps() -> None:
    scheduler = KarrasScheduler()
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999 and scheduler.timesteps[-1] == 0
    assert (scheduler.timesteps.diff() <= 0).all()
    with pytest.raises(OptionError, match="dpmpp_2m, dpmpp_sde"):
        KarrasScheduler(algorithm="magic")


def test_noise_is_added_at_begin_index() -> None:
    scheduler = KarrasScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    latents = torch.ones(2, 1, 2, 2)
    noise = torch.full((2, 1, 2, 2), 2.0)
    noisy = scheduler.add_noise(latents, noise, scheduler.timesteps[4:5].repeat(2))
    torch.testing.assert_close(noisy, 1 + 2 * scheduler.sigmas[4] * torch.ones(2, 1, 2, 2))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("algorithm", ["dpmpp_2m", "dpmpp_sde"])
def test_inpainting_restores_unmasked_area_at_each_noise_level(
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
    unmasked: list[torch.Tensor] = []

    def record(pipe: Any, i: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        unmasked.append(state["latents"][..., 4:].clone())
        return {}

    # The pipeline's generator draws this noise first.
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))[..., 4:]
    options = {
        "num_inference_steps": 5,
        "strength": strength,
        "generator": torch.Generator().manual_seed(7),
    }
    size = {"width": 16, "height": 16, "output_type": "latent"}
    pipe("portrait", image=latents, mask_image=mask, callback_on_step_end=record, **options, **size)
    expected = latents[..., 4:]
    levels = [*scheduler.levels[-len(unmasked) + 1 :], torch.tensor(0.0)]
    assert len(unmasked) == (5 if strength == 1 else 3) * scheduler.order - (scheduler.order - 1)
    for actual, level in zip(unmasked, levels, strict=True):
        torch.testing.assert_close(actual, expected + level * noise)


def test_begin_index_does_not_affect_next_run() -> None:
    """Not every pipeline calls `set_begin_index`: ControlNet's does not."""
    scheduler = KarrasScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        run_scheduler(scheduler, noise, 5), run_scheduler(KarrasScheduler(), noise, 5)
    )


def test_zero_snr_is_that_of_diffusers() -> None:
    """The rescaled schedule, finite also where training divides by its last alpha."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    options = {**betas, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    alphas = EulerDiscreteScheduler(**options).alphas_cumprod
    expected = ((1 - alphas) / alphas).sqrt()
    ours = KarrasScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert torch.allclose(ours.train_sigmas, expected, rtol=2e-3)
    assert float(ours.sigmas[0]) == pytest.approx(4096, rel=1e-4)
    schedule = NoiseSchedule(DDIMScheduler(**options).alphas_cumprod, "v_prediction")
    assert bool(schedule.trailing_sigmas(4).isfinite().all())
    assert bool(schedule.snr(torch.tensor([999])).isfinite().all())
