"""The lightning branch against diffusers' sampler, and how far its gradients reach."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from openpulid.errors import OptionError
from openpulid.training.pulid.branches import (
    RolloutConfig,
    denoise_until,
    lightning_branch,
    queries_at_step,
)
from openpulid.training.pulid.models import SDXLModel
from tests.support import tiny_sdxl as tiny


@pytest.fixture(params=["epsilon", "v_prediction"])
def base(request):
    pipe = tiny.pipe(request.param)
    pipe.scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        prediction_type=request.param,
        timestep_spacing="trailing",
        solver_order=1,
        rescale_betas_zero_snr=request.param == "v_prediction",
    )
    pipe.set_progress_bar_config(disable=True)
    return SDXLModel(pipe)


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def count_calls(base):
    calls = []
    predict = base.predict

    def counted(x_t, t, text):
        calls.append((torch.is_grad_enabled(), t[0].item()))
        return predict(x_t, t, text)

    base.predict = counted
    return calls


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_rollout_matches_diffusers(base, noise, guidance):
    prompts = ["portrait of a person", "noir"]
    theirs = base.pipe(
        prompts, latents=noise, num_inference_steps=4, guidance_scale=guidance, output_type="latent"
    ).images
    text = base.encode_text(prompts, guided=guidance != 1)
    with torch.no_grad():
        ours = lightning_branch(base, noise, text, RolloutConfig(4, 0, guidance)).latents
    assert torch.allclose(ours, theirs, atol=2e-3 * theirs.abs().max().item())


def test_second_order_rollout_matches_diffusers(base, noise):
    from openpulid.diffusion.sampling import dpmpp_2m

    base.pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        base.pipe.scheduler.config, solver_order=2
    )
    theirs = base.pipe(
        ["noir"] * 2, latents=noise, num_inference_steps=6, guidance_scale=1.0, output_type="latent"
    ).images
    with torch.no_grad():
        ours = lightning_branch(
            base, noise, base.encode_text(["noir"] * 2), RolloutConfig(6, 0, sampler=dpmpp_2m)
        ).latents
    assert torch.allclose(ours, theirs, atol=5e-3 * theirs.abs().max().item())


def test_timesteps_are_trailing(base):
    sigmas = base.schedule.trailing_sigmas(4)
    assert base.schedule.sigma_to_timestep(sigmas[:4]).tolist() == pytest.approx(
        [999, 749, 499, 249], abs=1e-2
    )
    assert sigmas[4] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize("last", [0, 1, 3, 4])
def test_only_the_last_steps_carry_gradients(base, noise, last):
    calls = count_calls(base)
    adapter = tiny.adapter(base)
    tokens = adapter.encode(torch.ones(2, tiny.ID), [torch.ones(2, 5, tiny.WIDTH)] * 5)
    with adapter.use_tokens(tokens, guided=False):
        rollout = lightning_branch(
            base,
            noise,
            base.encode_text(["noir"] * 2),
            RolloutConfig(4, last),
            capture_attention=True,
        )
    assert [grad for grad, _ in calls] == [False] * (4 - last) + [True] * last
    assert rollout.latents.requires_grad == (last > 0)
    layers = len(adapter.id_adapter_attn_layers)
    assert [len(step) for step in rollout.attention] == [layers] * last
    assert all(layer.query.requires_grad for step in rollout.attention for layer in step[1:])


def test_checkpointed_rollout_gives_the_same_gradients(base, noise):
    gradients = []
    for again in (False, True):
        calls = count_calls(base)
        adapter = tiny.adapter(base)
        tokens = adapter.encode(torch.ones(2, tiny.ID), [torch.ones(2, 5, tiny.WIDTH)] * 5)
        with adapter.use_tokens(tokens, guided=False):  # open until the backward pass is done
            rollout = lightning_branch(
                base,
                noise,
                base.encode_text(["noir"] * 2),
                RolloutConfig(3, 2, gradient_checkpointing=again),
                capture_attention=True,
            )
            queries = sum(
                layer.query.square().mean() for step in rollout.attention for layer in step
            )
            (rollout.latents.square().mean() + queries).backward()
        assert len(calls) == (5 if again else 3)
        gradients.append([p.grad for p in adapter.parameters()])
        adapter.detach()
    for one, other in zip(*gradients, strict=True):
        assert one.abs().sum() > 0 and torch.allclose(one, other, rtol=1e-4, atol=1e-8)


def test_single_step_of_a_guided_rollout(base, noise):
    walk = RolloutConfig(30, 2, guidance_scale=3.0)
    text, guided = (base.encode_text(["noir"] * 2, guided=g) for g in (False, True))
    x, sigma = denoise_until(base, noise, guided, walk, 5)
    assert not x.requires_grad and torch.equal(
        sigma, base.schedule.trailing_sigmas(30)[5].expand(2)
    )
    start, _ = denoise_until(base, noise, guided, walk, 0)
    with torch.no_grad():
        assert torch.equal(
            queries_at_step(base, start, base.schedule.trailing_sigmas(30)[:1].expand(2), text)
            .layers[0]
            .query,
            lightning_branch(base, noise, text, RolloutConfig(30, 30), capture_attention=True)
            .attention[0][0]
            .query,
        )


def test_invalid_rollouts_raise(base, noise):
    with pytest.raises(OptionError, match="0 to 4"):
        RolloutConfig(4, 5)
    with pytest.raises(OptionError, match="queries_at_step"):
        lightning_branch(
            base,
            noise,
            base.encode_text(["noir"], guided=True),
            RolloutConfig(guidance_scale=2.0),
            capture_attention=True,
        )
