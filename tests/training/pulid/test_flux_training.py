"""PuLID's stages on a tiny random FLUX: gradients, recomputation, and the adapter's file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.pulid import IDFormer, PuLIDFlux
from openpulid.training.pulid.flux_model import FluxModel
from openpulid.training.pulid.recipes import RECIPES, Recipe, find_recipe
from openpulid.training.pulid.task import PuLIDTask
from openpulid.training.pulid.train import build_adapter, train_adapter
from openpulid.training.rng import StepRNG
from tests.support import tiny_sdxl
from tests.support.tiny_flux import SMALL, tiny_pipe

SIDE = 16
STAGES: dict[str, dict[str, Any]] = {
    "stage1": {},
    "naive": {"id_loss": "naive", "few_step_batch": 2},
    "stage2": {"id_loss": "accurate", "few_step_batch": 2, "grad_steps": 2},
    "stage3": {
        "id_loss": "accurate",
        "few_step_batch": 2,
        "grad_steps": 2,
        "semantic_weight": 0.6,
        "layout_weight": 0.1,
    },
}


def recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "steps": 12,
        "lr": 1e-2,
        "warmup": 2,
        "drop_identity": 0.0,
        "attention_head_dim": 8,
        "attention_heads": 2,
        "encoder_width": 16,
        "bf16": False,
    }
    return Recipe("tiny", base="flux", encoder="IDFormer", **{**settings, **changes})


def models() -> list[FluxModel]:
    """Create a base, and a few-step model without guidance embedding."""
    pipes = [tiny_pipe(), tiny_pipe(guidance_embeds=False)]
    return [FluxModel(pipe, SIDE, guidance=3.5, max_sequence_length=12) for pipe in pipes]


def create_task(batch: int = 4, **changes: Any) -> PuLIDTask:
    settings = recipe(**changes)
    base, few_step = models()
    adapter = build_adapter(settings, base, {**SMALL, "output_dim": 16})
    for layer in adapter.layers:  # untrained, they add nothing
        torch.nn.init.normal_(layer.to_out.weight, std=0.3)
    return PuLIDTask(
        settings,
        base,
        adapter,
        tiny_sdxl.People(batch),
        held_out=tiny_sdxl.People(batch),
        few_step_models=[few_step] if settings.few_step_batch else [],
        face_embedder=tiny_sdxl.faces() if settings.few_step_batch else None,
    )


def gradients(task: PuLIDTask) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the adapter's gradients and the losses of one step."""
    losses: dict[str, float] = {}

    def backward(terms: dict[str, Tensor], metrics: Any = None) -> None:
        losses.update({name: float(loss) for name, loss in terms.items()})
        sum(terms.values()).backward()

    task.backward_losses(StepRNG(0, 0), backward)
    found = {name: x.grad for name, x in task.adapter.named_parameters()}
    assert all(grad is not None for grad in found.values()), found
    return found, losses  # type: ignore[return-value]


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_reach_the_adapter_and_nothing_else(stage: str) -> None:
    task = create_task(**STAGES[stage])
    found, losses = gradients(task)
    assert all(grad.abs().sum() > 0 for grad in found.values())
    expected = {
        "stage1": {"diffusion"},
        "naive": {"diffusion", "id"},
        "stage2": {"diffusion", "id"},
        "stage3": {"diffusion", "id", "semantic", "layout"},
    }
    assert set(losses) == expected[stage] and all(value > 0 for value in losses.values())
    for model in (task.base, *task.few_step_models):
        for part in (model.network, model.pipe.vae, model.pipe.text_encoder_2):
            assert all(x.grad is None and not x.requires_grad for x in part.parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_blocks_give_the_same_gradients(stage: str) -> None:
    """With the identity's hooks, over several steps, and while attention is captured."""
    expected, losses = gradients(create_task(**STAGES[stage]))
    task = create_task(**STAGES[stage], gradient_checkpointing=True)
    for model in (task.base, *task.few_step_models):
        model.network.enable_gradient_checkpointing()
        assert model.network.is_gradient_checkpointing
    found, recomputed = gradients(task)
    assert recomputed == pytest.approx(losses, rel=1e-5)
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=1e-4, atol=1e-6), name


def test_training_learns_the_identity_and_keeps_the_base(tmp_path: Path) -> None:
    task = create_task(8)
    base = task.base
    before = {name: x.clone() for name, x in base.network.state_dict().items()}
    fresh = task.validate()
    settings = recipe(lr=2e-2, steps=40, ema=0.8, validate_every=40)
    result = train_adapter(
        settings, base, task.adapter, task.data, tmp_path, held_out=task.held_out
    )
    trained = result.metrics
    assert trained["held_out_own"] < 0.95 * fresh["held_out_own"]
    assert trained["held_out_own"] < trained["held_out_none"]
    assert trained["held_out_own"] < trained["held_out_other"]
    assert all(torch.equal(x, before[name]) for name, x in base.network.state_dict().items())

    # the file has published names, sizes and places, and the same weights
    loaded = PuLIDFlux.load(tmp_path / "adapter.safetensors")
    state = task.adapter.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())
    assert {name.split(".")[0] for name in state} == {"pulid_encoder", "pulid_ca"}
    loaded.attach(base.pipe)
    assert loaded.layer_sizes() == {"dim_head": 8, "double_interval": 2, "single_interval": 4}


def test_adapter_is_continued(tmp_path: Path) -> None:
    task = create_task()
    path = task.adapter.save(tmp_path / "first.safetensors")
    sizes = {**SMALL, "output_dim": 16}
    continued = build_adapter(recipe(init_from="tiny"), task.base, sizes, init_adapter=path)
    assert torch.equal(continued.layers[0].to_out.weight, task.adapter.layers[0].to_out.weight)
    other = FluxModel(tiny_pipe(num_layers=5), SIDE)
    with pytest.raises(WeightsError, match="trained for another transformer"):
        build_adapter(recipe(), other, sizes, init_adapter=path)
    with pytest.raises(WeightsError, match="is PuLID's adapter for SDXL"):
        sdxl = tiny_sdxl.adapter(tiny_sdxl.base()).save(tmp_path / "sdxl.safetensors")
        build_adapter(recipe(), task.base, sizes, init_adapter=sdxl)


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
