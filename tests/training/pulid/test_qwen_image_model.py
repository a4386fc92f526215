"""Qwen-Image as a training base: equal to its pipeline, its autoencoder's scale, attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.io.hub import WEIGHTS
from openpulid.methods.pulid import IDFormer, PuLIDFlux, transfer_adapter
from openpulid.pipelines.factory import load_pipeline
from openpulid.pipelines.presets import flux
from openpulid.training.pulid.branches import (
    RolloutConfig,
    diffusion_branch,
    lightning_branch,
    queries_at_step,
)
from openpulid.training.pulid.photo_bases import BASES
from openpulid.training.pulid.qwen_image_model import QwenImageModel
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.rng import StepRNG
from tests.support.flow_training import recipe
from tests.support.tiny_bases import qwen_image_with_text
from tests.training.pulid.test_flux_model import AttentionInputs

PROMPTS = ["portrait of a person", "a portrait"]
SIDE = 32


@pytest.fixture
def model() -> QwenImageModel:
    return QwenImageModel(qwen_image_with_text(), SIDE, max_sequence_length=12)


def noise(model: QwenImageModel, count: int = 2) -> Tensor:
    shape = (count, *model.latent_shape())
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("steps", [4, 6])
def test_rollout_equals_pipeline(model: QwenImageModel, steps: int) -> None:
    """The same noise, prompts and steps give the pipeline's images; one prompt is padded."""
    start = noise(model)
    text = model.encode_text(PROMPTS)
    assert text.mask is not None and text.mask.sum(1).tolist() == [5, 3]
    with torch.no_grad():
        ours = lightning_branch(model, start, text, RolloutConfig(steps, 0)).latents
        images = model.decode(ours)
    count, channels, height, width = start.shape
    theirs = model.pipe(
        prompt=PROMPTS,
        latents=model.pipe._pack_latents(start, count, channels, height, width),
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        true_cfg_scale=1.0,
        max_sequence_length=12,
        output_type="pt",
    ).images
    assert ours.shape == start.shape and not torch.allclose(ours, start, atol=0.1)
    assert torch.allclose(images.clamp(0, 1), theirs, atol=2e-5)
    assert ((images > 0) & (images < 1)).float().mean() > 0.5  # not only clamped pixels


def test_latents_have_the_scale_of_the_pipeline(model: QwenImageModel) -> None:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    mode = model.vae.encode(2 * images.unsqueeze(2) - 1).latent_dist.mode()
    decoded = model.vae.decode(mode).sample.squeeze(2) / 2 + 0.5
    latents = model.encode(images)
    assert torch.allclose(model.decode(latents), decoded, atol=1e-5)
    # mean and standard deviation of the second channel
    assert torch.allclose(latents[:, 1], (mode[:, 1, 0] + 0.2) / 0.5, atol=1e-5)


def test_captured_attention_is_that_of_the_blocks(model: QwenImageModel) -> None:
    text = model.encode_text(PROMPTS)
    num_text = text.embeds.shape[1]
    with AttentionInputs() as inputs, torch.no_grad():
        captured = queries_at_step(model, noise(model), torch.tensor([0.7, 0.7]), text).layers
    assert len(captured) == len(inputs.pairs) == len(model.blocks)
    for pair, (query, key) in zip(captured, inputs.pairs, strict=True):
        assert torch.allclose(pair.query, query[:, :, num_text:], atol=1e-6)
        assert torch.allclose(pair.key, key[:, :, :num_text], atol=1e-6)


def test_diffusion_branch_noises_on_a_straight_path(model: QwenImageModel) -> None:
    latents = noise(model)
    step = diffusion_branch(model, StepRNG(0, 0), latents, model.encode_text(PROMPTS))
    assert step.output.shape == step.target.shape == latents.shape
    x_0 = step.x_t - step.t.view(-1, 1, 1, 1) * step.target
    assert torch.allclose(x_0, latents, atol=1e-5)


def test_checkpoint_is_loaded_by_its_name(tmp_path: Path) -> None:
    qwen_image_with_text().save_pretrained(tmp_path / "qwen")
    settings = recipe("qwen-image", pixels=SIDE, text_tokens=12)
    bases = BASES[settings.base]
    (preset,) = bases.find_presets(settings, str(tmp_path / "qwen"), ())
    pipe = load_pipeline(preset, torch.device("cpu"), torch.float32)
    (base,) = bases.create_models(settings, [pipe])
    assert isinstance(base, QwenImageModel) and base.latent_shape() == (4, 16, 16)
    (default,) = bases.find_presets(settings, None, ())
    assert default.models.pipeline == "qwen-image-base" and "qwen-image-base" in WEIGHTS
    with pytest.raises(WeightsError, match="is a QwenImagePipeline; no adapter for it is publ"):
        load_pipeline(flux(tmp_path / "qwen"), torch.device("cpu"))


def test_recipe_at_full_size(golden: Any) -> None:
    """PuLID 0.9.1 begins an adapter for 20 of 60 blocks, on the meta device."""
    names = golden.manifest["pulid_flux"]
    settings = find_recipe("qwen_image_stage1")
    assert (settings.base, settings.init_from, settings.double_interval) == ("qwen-image", None, 3)
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel()
        state = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
        published = PuLIDFlux.from_state_dict(state, IDFormer())
        adapter = transfer_adapter(published, transformer, double_interval=3)
    adapter.attach(transformer)
    assert len(adapter.layers) == 20
    assert adapter.layers[0].to_q.weight.shape == (2048, 3072)
    with pytest.raises(OptionError, match="unknown recipe 'qwen_image_stage2'"):
        find_recipe("qwen_image_stage2")
