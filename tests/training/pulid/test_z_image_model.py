"""Z-Image as a training base: equal to its pipeline, its autoencoder's scale, attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from openpulid.errors import WeightsError
from openpulid.io.hub import WEIGHTS
from openpulid.methods.pulid import IDFormer, PuLIDFlux
from openpulid.pipelines.factory import load_pipeline
from openpulid.pipelines.presets import flux
from openpulid.training.pulid.branches import (
    RolloutConfig,
    diffusion_branch,
    lightning_branch,
    queries_at_step,
)
from openpulid.training.pulid.photo_bases import BASES
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.pulid.z_image_model import ZImageModel
from openpulid.training.rng import StepRNG
from tests.support.flow_training import STAGES, recipe
from tests.support.tiny_bases import z_image_with_text
from tests.training.pulid.test_flux_model import AttentionInputs

PROMPTS = ["portrait of a person", "a portrait"]
SIDE = 32


@pytest.fixture
def model() -> ZImageModel:
    return ZImageModel(z_image_with_text(), SIDE, max_sequence_length=12)


def noise(model: ZImageModel, count: int = 2) -> Tensor:
    shape = (count, *model.latent_shape())
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("steps", [4, 8])
def test_rollout_equals_pipeline(model: ZImageModel, steps: int) -> None:
    """The same noise, prompts and steps give the pipeline's latents and images."""
    start = noise(model)
    text = model.encode_text(PROMPTS)
    with torch.no_grad():
        ours = lightning_branch(model, start, text, RolloutConfig(steps, 0)).latents
        images = model.decode(ours)
    options: dict[str, Any] = {
        "latents": start,
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": steps,
        "guidance_scale": 0.0,
        "max_sequence_length": 12,
    }
    latents = model.pipe(prompt=list(PROMPTS), **options, output_type="latent").images
    theirs = model.pipe(prompt=list(PROMPTS), **options, output_type="pt").images
    assert ours.shape == start.shape
    assert torch.allclose(ours, latents, atol=2e-5)
    assert torch.allclose(images.clamp(0, 1), theirs, atol=2e-5)
    assert not torch.allclose(ours, start, atol=0.1)


def test_guided_text_has_empty_prompts_first(model: ZImageModel) -> None:
    texts = model.encode_text(PROMPTS, guided=True).embeds
    plain = model.encode_text(PROMPTS).embeds
    assert [len(x) for x in texts] == [1, 1, 5, 3]  # the sign for the end counts
    assert all(torch.equal(one, other) for one, other in zip(texts[2:], plain, strict=True))


def test_latents_have_the_scale_of_the_pipeline(model: ZImageModel) -> None:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    mode = model.vae.encode(2 * images - 1).latent_dist.mode()
    decoded = model.vae.decode(mode).sample / 2 + 0.5
    assert torch.allclose(model.decode(model.encode(images)), decoded, atol=1e-5)


def test_captured_attention_is_that_of_the_blocks(model: ZImageModel) -> None:
    """64 tokens of the image, then those of the text; the shorter prompt has three."""
    text = model.encode_text(PROMPTS)
    with AttentionInputs() as inputs, torch.no_grad():
        captured = queries_at_step(model, noise(model), torch.tensor([0.7, 0.7]), text).layers
    both = inputs.pairs[-len(captured) :]  # after the blocks of image and text alone
    assert len(captured) == len(model.network.layers)
    for pair, (query, key) in zip(captured, both, strict=True):
        assert torch.allclose(pair.query, query[:, :, :64], atol=1e-6)
        assert torch.allclose(pair.key, key[:, :, 64:67], atol=1e-6)


def test_diffusion_branch_noises_on_a_straight_path(model: ZImageModel) -> None:
    latents = noise(model)
    step = diffusion_branch(model, StepRNG(0, 0), latents, model.encode_text(PROMPTS))
    assert step.output.shape == step.target.shape == latents.shape
    x_0 = step.x_t - step.t.view(-1, 1, 1, 1) * step.target
    assert torch.allclose(x_0, latents, atol=1e-5)


def test_checkpoints_are_loaded_by_their_names(tmp_path: Path) -> None:
    z_image_with_text().save_pretrained(tmp_path / "z-image")
    folder = str(tmp_path / "z-image")
    settings = recipe("z-image", **STAGES["stage2"], pixels=SIDE, text_tokens=12)
    bases = BASES[settings.base]
    presets = bases.find_presets(settings, folder, [folder])
    device = torch.device("cpu")
    pipes = [load_pipeline(preset, device, torch.float32) for preset in presets]
    base, few_step = bases.create_models(settings, pipes)
    assert isinstance(base, ZImageModel) and base.vae is few_step.pipe.vae
    assert [len(x) for x in base.encode_text(["a portrait"]).embeds] == [3]
    names = {preset.models.pipeline for preset in bases.find_presets(settings, None, ())}
    assert names == {"z-image-base", "z-image-turbo"} <= WEIGHTS.keys()
    with pytest.raises(WeightsError, match="is a ZImagePipeline; no adapter for it is published"):
        load_pipeline(flux(tmp_path / "z-image"), device)


def test_recipes_at_full_size() -> None:
    """15 of 30 blocks of width 3840, on the meta device."""
    settings = find_recipe("z_image_stage3")
    with init_empty_weights():
        transformer = ZImageTransformer2DModel()
        adapter = PuLIDFlux.for_transformer(
            transformer,
            IDFormer(),
            dim_head=settings.attention_head_dim,
            heads=settings.attention_heads,
            double_interval=settings.double_interval,
            single_interval=settings.single_interval,
        )
    assert len(adapter.layers) == 15
    assert adapter.layers[0].to_q.weight.shape == (2048, 3840)
    chain = ["z_image_stage3", "z_image_stage2", "z_image_stage1"]
    recipes = [find_recipe(name) for name in chain]
    assert [one.init_from for one in recipes] == [*chain[1:], None]
    assert {(one.base, one.rollout_steps, one.text_tokens) for one in recipes} == {
        ("z-image", 8, 512)
    }
