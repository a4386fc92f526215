"""FLUX as a training base: equal to its pipeline, flow matching, attention with gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openpulid.diffusion.flow_schedule import FlowSchedule
from openpulid.diffusion.sampling import euler
from openpulid.errors import OptionError
from openpulid.training.pulid.branches import (
    RolloutConfig,
    diffusion_branch,
    lightning_branch,
    queries_at_step,
)
from openpulid.training.pulid.flux_model import FluxModel
from openpulid.training.rng import StepRNG
from tests.support.tiny_flux import tiny_pipe

PROMPTS = ["portrait of a person", "a portrait"]
SIDE = 32


@pytest.fixture
def pipe() -> Any:
    return tiny_pipe()


@pytest.fixture
def model(pipe: Any) -> FluxModel:
    return FluxModel(pipe, SIDE, guidance=3.5, max_sequence_length=12)


def noise(model: FluxModel, count: int = 2) -> Tensor:
    shape = (count, *model.latent_shape())
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_rollout_equals_pipeline(pipe: Any, model: FluxModel) -> None:
    """The same noise, prompts and steps give the pipeline's latents: packing, shift, guidance."""
    start = noise(model)
    text = model.encode_text(PROMPTS)
    with torch.no_grad():
        ours = lightning_branch(model, start, text, RolloutConfig(4, 0)).latents
    packed = pipe._pack_latents(start, 2, 4, *model.latent_shape()[1:])
    theirs = pipe(
        PROMPTS,
        latents=packed,
        height=SIDE,
        width=SIDE,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=12,
        output_type="latent",
    ).images
    theirs = pipe._unpack_latents(theirs, SIDE, SIDE, pipe.vae_scale_factor)
    assert ours.shape == start.shape
    assert torch.allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(("pixels", "num_tokens"), [(32, 64), (64, 256), (256, 4096)])
def test_shift_follows_the_resolution(pipe: Any, pixels: int, num_tokens: int) -> None:
    """The logarithm of the shift is 0.5 at 256 tokens and 1.15 at 4096."""
    model = FluxModel(pipe, pixels)
    assert (model.latent_shape()[1] // 2) ** 2 == num_tokens
    expected = 0.5 + 0.65 * (num_tokens - 256) / (4096 - 256)
    assert math.log(model.schedule.shift) == pytest.approx(expected)


def test_noise_levels_are_logit_normal() -> None:
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    levels = FlowSchedule(1.0, 0.3, 0.8).sample_timesteps(uniform)
    logits = levels.logit()
    assert logits.mean() == pytest.approx(0.3, abs=1e-3)
    assert logits.std() == pytest.approx(0.8, abs=1e-2)
    # a shift of 3 is a constant in the logit
    shifted = FlowSchedule(3.0, 0.3, 0.8).sample_timesteps(uniform).logit()
    assert torch.allclose(shifted, logits + torch.tensor(3.0).log(), atol=1e-4)
    assert torch.isfinite(FlowSchedule().sample_timesteps(torch.tensor([0.0, 1 - 1e-9]))).all()


def test_levels_of_validation_do_not_depend_on_the_training() -> None:
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75])
    for schedule in (FlowSchedule(), FlowSchedule(1.0, 0.5, 1.8)):
        assert torch.equal(schedule.spread_timesteps(uniform), uniform)
    shifted = FlowSchedule(3.0, 0.5).spread_timesteps(uniform)
    assert shifted.tolist() == pytest.approx([0.0, 0.5, 0.75, 0.9])


def test_velocity_leads_from_noise_to_image() -> None:
    schedule = FlowSchedule()
    image, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    levels = torch.tensor([0.2, 0.9, 0.5])
    x = schedule.add_noise(image, noise, levels)
    assert torch.allclose(x[0], 0.8 * image[0] + 0.2 * noise[0], atol=1e-6)
    velocity = schedule.target(image, noise, levels)
    assert torch.allclose(schedule.predict_x0(velocity, x, levels), image, atol=1e-5)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return schedule.denoise(lambda *_: velocity, x, sigma)

    sigmas = schedule.trailing_sigmas(3)
    assert sigmas.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    start = schedule.initial_sample(noise, sigmas)
    assert torch.allclose(euler(denoise, start, sigmas), image, atol=1e-5)


@pytest.mark.parametrize("values", [{"shift": 0.0}, {"logit_std": -1.0}])
def test_unsuitable_schedules_raise(values: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="must be positive"):
        FlowSchedule(**values)
    with pytest.raises(OptionError, match="set logit_mean instead"):
        FlowSchedule().sample_timesteps(torch.rand(2), 1.0)


class AttentionInputs(torch.overrides.TorchFunctionMode):
    """Records queries and keys of every attention that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            self.pairs.append((query, key))
        return func(*args, **kwargs)


def test_captured_attention_is_that_of_the_blocks(model: FluxModel) -> None:
    text = model.encode_text(PROMPTS)
    num_text = text.embeds.shape[1]
    with AttentionInputs() as inputs, torch.no_grad():
        captured = queries_at_step(model, noise(model), torch.tensor([0.7, 0.7]), text).layers
    blocks = [*model.transformer.transformer_blocks, *model.transformer.single_transformer_blocks]
    assert len(captured) == len(inputs.pairs) == len(blocks)
    for pair, (query, key) in zip(captured, inputs.pairs, strict=True):
        assert torch.allclose(pair.query, query[:, :, num_text:], atol=1e-6)
        assert torch.allclose(pair.key, key[:, :, :num_text], atol=1e-6)


def test_latents_keep_their_scale(pipe: Any, model: FluxModel) -> None:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    latents = model.encode(images)
    mode = pipe.vae.encode(2 * images - 1).latent_dist.mode()
    assert torch.allclose(latents, mode - 0.1, atol=1e-6)  # the VAE's shift
    decoded = pipe.vae.decode(mode).sample / 2 + 0.5
    assert torch.allclose(model.decode(latents), decoded, atol=1e-5)


def test_diffusion_branch_noises_on_a_straight_path(model: FluxModel) -> None:
    latents = noise(model)
    step = diffusion_branch(model, StepRNG(0, 0), latents, model.encode_text(PROMPTS))
    assert step.output.shape == step.target.shape == latents.shape
    x_0 = step.x_t - step.t.view(-1, 1, 1, 1) * step.target
    assert torch.allclose(x_0, latents, atol=1e-5)
