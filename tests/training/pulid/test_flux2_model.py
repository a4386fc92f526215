"""FLUX.2 klein as a training base: equal to its pipeline, its autoencoder's scale, attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openpulid.training.pulid.branches import (
    RolloutConfig,
    diffusion_branch,
    lightning_branch,
    queries_at_step,
)
from openpulid.training.pulid.flux2_model import Flux2Model
from openpulid.training.rng import StepRNG
from tests.support.tiny_bases import flux2_with_text
from tests.training.pulid.test_flux_model import AttentionInputs

PROMPTS = ["portrait of a person", "a portrait"]
SIDE = 32


@pytest.fixture
def pipe() -> Any:
    return flux2_with_text()


@pytest.fixture
def model(pipe: Any) -> Flux2Model:
    return Flux2Model(pipe, SIDE, num_steps=4, max_sequence_length=12)


def noise(model: Flux2Model, count: int = 2) -> Tensor:
    shape = (count, *model.latent_shape())
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("steps", [4, 6])
def test_rollout_equals_pipeline(pipe: Any, steps: int) -> None:
    """The same noise, prompts and steps give the pipeline's latents and images."""
    model = Flux2Model(pipe, SIDE, num_steps=steps, max_sequence_length=12)
    start = noise(model)
    text = model.encode_text(PROMPTS)
    with torch.no_grad():
        ours = lightning_branch(model, start, text, RolloutConfig(steps, 0)).latents
        images = model.decode(ours)
    options: dict[str, Any] = {
        "latents": pipe._patchify_latents(start),
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": steps,
        "guidance_scale": 1.0,
        "max_sequence_length": 12,
    }
    theirs = pipe(prompt=PROMPTS, **options, output_type="pt").images
    assert ours.shape == start.shape
    assert torch.allclose(images.clamp(0, 1), theirs, atol=2e-5)
    assert ((images > 0) & (images < 1)).float().mean() > 0.5  # not only clamped pixels


def test_shift_follows_resolution_and_steps(pipe: Any) -> None:
    """At 512 pixels klein's transformer has 1,024 tokens."""
    fewer, more = (Flux2Model(pipe, 128, num_steps=steps) for steps in (4, 50))
    assert (fewer.latent_shape()[1] // 2) ** 2 == 1024
    assert fewer.schedule.shift > more.schedule.shift > 1
    levels = fewer.schedule.trailing_sigmas(4).tolist()
    assert levels == pytest.approx([1, 0.96, 0.88, 0.72, 0], abs=0.01)
    assert math.log(fewer.schedule.shift) == pytest.approx(2.03, abs=0.01)


def test_latents_are_those_of_the_pipeline(pipe: Any, model: Flux2Model) -> None:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    latents = model.encode(images)
    expected = pipe._encode_vae_image(2 * images - 1, torch.Generator())
    assert torch.allclose(pipe._patchify_latents(latents), expected, atol=1e-5)
    mode = pipe.vae.encode(2 * images - 1).latent_dist.mode()
    decoded = pipe.vae.decode(mode).sample / 2 + 0.5
    assert torch.allclose(model.decode(latents), decoded, atol=1e-5)


def test_captured_attention_is_that_of_the_blocks(model: Flux2Model) -> None:
    """Text has positions, so that its keys are rotated too."""
    text = model.encode_text(PROMPTS)
    num_text = text.embeds.shape[1]
    with AttentionInputs() as inputs, torch.no_grad():
        captured = queries_at_step(model, noise(model), torch.tensor([0.7, 0.7]), text).layers
    assert len(captured) == len(inputs.pairs) == len(model.blocks)
    for pair, (query, key) in zip(captured, inputs.pairs, strict=True):
        assert torch.allclose(pair.query, query[:, :, num_text:], atol=1e-6)
        assert torch.allclose(pair.key, key[:, :, :num_text], atol=1e-6)


def test_diffusion_branch_noises_on_a_straight_path(model: Flux2Model) -> None:
    latents = noise(model)
    step = diffusion_branch(model, StepRNG(0, 0), latents, model.encode_text(PROMPTS))
    assert step.output.shape == step.target.shape == latents.shape
    x_0 = step.x_t - step.t.view(-1, 1, 1, 1) * step.target
    assert torch.allclose(x_0, latents, atol=1e-5)


def test_networks_are_frozen_and_decoding_has_gradient(model: Flux2Model) -> None:
    latents = noise(model).requires_grad_(True)
    model.decode(latents).square().mean().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    for part in (model.network, model.pipe.vae, model.pipe.text_encoder):
        assert not any(x.requires_grad for x in part.parameters())
