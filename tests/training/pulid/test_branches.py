"""The base behind three functions: against diffusers' own formulas, and hand-computed losses."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.errors import OptionError
from openpulid.training.pulid.branches import DiffusionStep, diffusion_branch
from openpulid.training.pulid.losses import DiffusionLoss
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.rng import StepRNG
from tests.support import tiny_sdxl as tiny


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_schedule_is_diffusers(prediction):
    theirs = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    ours = NoiseSchedule(theirs.alphas_cumprod, prediction)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 4, 4, generator=generator)
    t = torch.tensor([0, 500, 900])
    x_t = ours.add_noise(x, noise, t)
    assert torch.allclose(x_t, theirs.add_noise(x, noise, t), atol=1e-6)
    target = noise if prediction == "epsilon" else theirs.get_velocity(x, noise, t)
    assert torch.allclose(ours.target(x, noise, t), target, atol=1e-6)
    assert torch.allclose(ours.predict_x0(target, x_t, t), x, atol=1e-4)
    assert ours.sample_timesteps(torch.tensor([0.0, 0.5, 0.9999])).tolist() == [0, 500, 999]


def test_late_times_are_as_dense_as_a_power_of_t():
    schedule = NoiseSchedule(torch.linspace(0.999, 0.001, 1000))
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    for power in (1.0, 2.0):
        times = schedule.sample_timesteps(uniform, power)
        assert times.min() >= 0 and times.max() == 999
        below = (times < 500).double().mean().item()
        assert below == pytest.approx(
            0.5 ** (1 + power), abs=2e-3
        )  # integral of (1 + p) t^p up to one half


def test_other_predictions_are_refused():
    with pytest.raises(OptionError, match="sample"):
        NoiseSchedule(torch.tensor([0.9, 0.1]), "sample")


def test_sdxl_predicts_what_the_pipeline_predicts(pipe):
    base = SDXLModel(pipe)
    text = base.encode_text(["portrait of a person", "noir"])
    embeds, _, pooled, _ = pipe.encode_prompt(
        ["portrait of a person", "noir"], do_classifier_free_guidance=False
    )
    assert torch.equal(text.embeds, embeds) and torch.equal(text.pooled, pooled)
    assert text.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda m, a, k: seen.append((a, k)), with_kwargs=True
    )
    pipe("noir", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    hook.remove()
    (x, t), named = seen[0]
    output = base.predict(x, t.expand(1), base.encode_text(["noir"]))
    assert torch.equal(output, pipe.unet(x, t, **named)[0])


def test_decode_passes_gradient_and_is_the_pipelines(pipe):
    base = SDXLModel(pipe)
    latents = torch.randn(
        1, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    picture = base.decode(latents)
    picture.sum().backward()
    theirs = pipe.vae.decode(latents.detach() / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    assert (
        picture.shape == (1, 3, 16, 16)
        and torch.equal(picture, theirs)
        and latents.grad.abs().sum() > 0
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_branch_is_a_function_of_the_draw(prediction):
    base = SDXLModel(tiny.pipe(prediction))
    latents = tiny.People().latents[:2]
    text = base.encode_text(["noir", "hat"])
    a, b = (diffusion_branch(base, StepRNG(3, 1), latents, text) for _ in range(2))
    assert torch.equal(a.output, b.output) and torch.equal(a.target, b.target)
    assert (
        a.target - StepRNG(3, 1).randn((2, 4, 8, 8), "noise")
    ).abs().max().item() == 0 or prediction != "epsilon"


def denoised(t):
    output = torch.zeros(2, 1, 1, 2)
    target = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2).expand(2, -1, -1, -1)
    return DiffusionStep(output.bfloat16(), target, output, torch.tensor(t))


def test_diffusion_loss_by_hand():
    schedule = NoiseSchedule(torch.tensor([0.8, 0.5, 0.0]))  # SNR 4, 1, 0
    mask = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2).expand(2, -1, -1, -1)
    assert DiffusionLoss(schedule)(denoised([0, 1])).item() == 5.0  # (1 + 9) / 2
    assert (
        DiffusionLoss(schedule, inside=3.0)(denoised([0, 1]), mask).item() == 3.0
    )  # (3 * 1 + 1 * 9) / 4
    # min(4, 2) / 4 = 0.5 and min(1, 2) / 1 = 1
    assert DiffusionLoss(schedule, gamma=2.0)(denoised([0, 1])).item() == pytest.approx(5 * 0.75)
    v = NoiseSchedule(torch.tensor([0.8, 0.5, 0.0]), "v_prediction")  # 2 / 5 and 1 / 2
    assert DiffusionLoss(v, gamma=2.0)(denoised([0, 1])).item() == pytest.approx(5 * 0.45)
    assert DiffusionLoss(v, gamma=2.0)(denoised([2, 2])).item() == 0.0
    assert torch.isfinite(DiffusionLoss(schedule, gamma=2.0)(denoised([2, 2])))
    with pytest.raises(OptionError, match="positive"):
        DiffusionLoss(schedule, inside=0.0)
