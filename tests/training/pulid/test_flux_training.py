"""PuLID's stages on tiny random FLUX.1 and FLUX.2: gradients, precision, the adapter's file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel

from openpulid.device import training_dtype
from openpulid.errors import OptionError, WeightsError
from openpulid.methods.pulid import IDFormer, PuLIDFlux
from openpulid.training.precision import autocast
from openpulid.training.pulid.flux_model import FluxModel
from openpulid.training.pulid.recipes import RECIPES, find_recipe
from openpulid.training.pulid.train import build_adapter, train_adapter
from tests.support import tiny_sdxl
from tests.support.flow_training import (
    BASES,
    SIDE,
    SIZES,
    STAGES,
    create_task,
    gradients,
    recipe,
)
from tests.support.tiny_flux import tiny_pipe

CPU = torch.device("cpu")
LOSSES = {
    "stage1": {"diffusion"},
    "naive": {"diffusion", "id"},
    "stage2": {"diffusion", "id"},
    "stage3": {"diffusion", "id", "semantic", "layout"},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("base", BASES)
def test_gradients_reach_the_adapter_and_nothing_else(base: str, stage: str) -> None:
    task = create_task(base, **STAGES[stage])
    found, losses = gradients(task)
    assert all(grad.abs().sum() > 0 for grad in found.values())
    assert set(losses) == LOSSES[stage] and all(value > 0 for value in losses.values())
    for model in (task.base, *task.few_step_models):
        encoders = [getattr(model.pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
        for part in (model.network, model.pipe.vae, *filter(None, encoders)):
            assert all(x.grad is None and not x.requires_grad for x in part.parameters())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("base", BASES)
def test_recomputed_blocks_give_the_same_gradients(base: str, stage: str) -> None:
    """With the identity's hooks, over several steps, and while attention is captured."""
    expected, losses = gradients(create_task(base, **STAGES[stage]))
    task = create_task(base, **STAGES[stage], gradient_checkpointing=True)
    for model in (task.base, *task.few_step_models):
        model.network.enable_gradient_checkpointing()
        assert model.network.is_gradient_checkpointing
    found, recomputed = gradients(task)
    assert recomputed == pytest.approx(losses, rel=1e-5)
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("base", BASES)
def test_frozen_networks_in_reduced_precision(base: str, both_precisions: bool) -> None:
    """As at full size: networks in the device's dtype, the adapter in float32, under autocast."""
    expected, losses = gradients(create_task(base, **STAGES["stage3"]))
    task = create_task(base, **STAGES["stage3"])
    dtype = training_dtype(CPU)
    assert dtype is (torch.bfloat16 if both_precisions else torch.float32)
    for model in (task.base, *task.few_step_models):
        model.network.to(dtype)
        model.vae.to(dtype)
    with autocast(CPU):
        found, reduced = gradients(task)
    tolerance = 0.1 if both_precisions else 1e-5
    assert reduced == pytest.approx(losses, rel=tolerance)
    for name, grad in found.items():
        assert grad.dtype is torch.float32 and grad.isfinite().all(), name
    whole, other = (
        torch.cat([one[name].flatten() for name in expected]) for one in (expected, found)
    )
    assert torch.cosine_similarity(whole, other, dim=0) > 1 - tolerance


@pytest.mark.parametrize("base", BASES)
def test_training_learns_the_identity_and_keeps_the_base(base: str, tmp_path: Path) -> None:
    task = create_task(base, 8)
    network = task.base.network
    before = {name: x.clone() for name, x in network.state_dict().items()}
    fresh = task.validate()
    settings = recipe(base, lr=2e-2, steps=40, ema=0.8, validate_every=40)
    result = train_adapter(
        settings, task.base, task.adapter, task.data, tmp_path, validation=task.validation
    )
    trained = result.metrics
    assert trained["held_out_own"] < 0.95 * fresh["held_out_own"]
    assert trained["held_out_own"] < trained["held_out_none"]
    assert trained["held_out_own"] < trained["held_out_other"]
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())

    # the file has published names, sizes and places, and the same weights
    loaded = PuLIDFlux.load(tmp_path / "adapter.safetensors")
    state = task.adapter.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())
    assert {name.split(".")[0] for name in state} == {"pulid_encoder", "pulid_ca"}
    loaded.attach(task.base.pipe)
    assert loaded.layer_sizes() == {"dim_head": 8, "double_interval": 2, "single_interval": 4}


def test_adapter_is_continued(tmp_path: Path) -> None:
    task = create_task()
    path = task.adapter.save(tmp_path / "first.safetensors")
    continued = build_adapter(recipe(init_from="tiny"), task.base, SIZES, init_adapter=path)
    assert torch.equal(continued.layers[0].to_out.weight, task.adapter.layers[0].to_out.weight)
    other = FluxModel(tiny_pipe(num_layers=5), SIDE)
    with pytest.raises(WeightsError, match="trained for another transformer"):
        build_adapter(recipe(), other, SIZES, init_adapter=path)
    with pytest.raises(WeightsError, match="is PuLID's adapter for SDXL"):
        sdxl = tiny_sdxl.adapter(tiny_sdxl.base()).save(tmp_path / "sdxl.safetensors")
        build_adapter(recipe(), task.base, SIZES, init_adapter=sdxl)


def test_recipes_train_the_published_names() -> None:
    """At full size, on the meta device."""
    with init_empty_weights():
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        settings = find_recipe("flux_stage3")
        adapter = PuLIDFlux.for_transformer(
            transformer,
            IDFormer(hidden_dim=settings.encoder_width),
            dim_head=settings.attention_head_dim,
            heads=settings.attention_heads,
            double_interval=settings.double_interval,
            single_interval=settings.single_interval,
        )
    assert len(adapter.layers) == 20
    assert adapter.layers[0].to_q.weight.shape == (2048, 3072)
    assert adapter.layers[0].to_kv.weight.shape == (4096, 2048)
    chain = ["flux_stage3", "flux_stage2", "flux_stage1"]
    assert [find_recipe(name).init_from for name in chain] == [*chain[1:], None]
    assert all(RECIPES[name]().base == "flux" for name in RECIPES if name.startswith("flux_"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "IDEncoder"}, "encoder 'IDFormer' alone"),
        ({"sampler": "dpmpp_2m"}, "sampler 'euler' alone"),
        ({"guidance_scale": 2.0}, "guidance_scale 1.0 alone"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma None alone"),
        ({"logit_std": 0.0}, "logit_std"),
    ],
)
def test_settings_without_meaning_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(find_recipe("flux_stage1"), **changes)


def test_identity_attention_starts_without_effect_or_at_random() -> None:
    model = create_task().base
    zero, random = (
        build_adapter(recipe(zero_output=value), model, SIZES) for value in (True, False)
    )
    for one, other in zip(zero.layers, random.layers, strict=True):
        assert not one.to_out.weight.any() and other.to_out.weight.std() > 0.1
        assert torch.equal(one.to_kv.weight, other.to_kv.weight)
