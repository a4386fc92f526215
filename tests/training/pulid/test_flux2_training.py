"""Adapters for FLUX.2 klein that begin with one for FLUX.1; its recipes and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from openpulid.errors import WeightsError
from openpulid.io.hub import WEIGHTS
from openpulid.methods.pulid import IDFormer, PuLIDFlux, transfer_adapter
from openpulid.pipelines.factory import load_pipeline
from openpulid.pipelines.presets import flux
from openpulid.training.pulid.flux2_model import Flux2Model
from openpulid.training.pulid.photo_bases import BASES
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.pulid.train import build_adapter
from tests.support import tiny_flux
from tests.support.flow_training import SIDE, SIZES, STAGES, models, recipe
from tests.support.tiny_bases import flux2_with_text

KLEIN = "flux2-klein"


def flux_adapter(width: int = 2) -> PuLIDFlux:
    """Create a random adapter with as many layers as the published one, for FLUX.1's blocks."""
    torch.manual_seed(1)
    transformer = tiny_flux.tiny_transformer(
        num_layers=19, num_single_layers=38, num_attention_heads=width
    )
    encoder = IDFormer(**SIZES, hidden_dim=16)
    adapter = PuLIDFlux.for_transformer(transformer, encoder, dim_head=8, heads=2)
    for layer in adapter.layers:
        nn.init.normal_(layer.to_out.weight, std=0.3)
    return adapter


def test_adapter_begins_with_that_of_flux1(tmp_path: Path) -> None:
    base = models(KLEIN)[0]
    source = flux_adapter()
    path = source.save(tmp_path / "flux.safetensors")
    adapter = build_adapter(recipe(KLEIN), base, SIZES, init_adapter=path)
    assert isinstance(adapter, PuLIDFlux)
    # 3 double and 5 single blocks: places 0 and 2, 0 and 4, are the first and last of FLUX.1's
    for layer, index in zip(adapter.layers, (0, 9, 10, 19), strict=True):
        assert torch.equal(layer.to_kv.weight, source.layers[index].to_kv.weight)
        assert torch.equal(layer.to_q.weight, source.layers[index].to_q.weight)
        assert not layer.to_out.weight.any()
    encoders = zip(adapter.encoder.parameters(), source.encoder.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in encoders)

    # an adapter of FLUX.2 is continued as it is
    nn.init.normal_(adapter.layers[0].to_out.weight)
    own = adapter.save(tmp_path / "own.safetensors")
    continued = build_adapter(recipe(KLEIN), base, SIZES, init_adapter=own)
    assert torch.equal(continued.layers[0].to_out.weight, adapter.layers[0].to_out.weight)

    wide = flux_adapter(4).save(tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match="trained for another transformer: it has 20 layers"):
        build_adapter(recipe(KLEIN), base, SIZES, init_adapter=wide)
    with pytest.raises(WeightsError, match=r"FLUX\.2 can begin with one for FLUX\.1 of width 32"):
        transfer_adapter(flux_adapter(4), base.network)
    with pytest.raises(WeightsError, match="20 layers; this one has 4"):
        transfer_adapter(adapter, base.network)


def test_recipes_at_full_size(golden: Any) -> None:
    """PuLID 0.9.1 begins an adapter for klein 4B with 8 layers, on the meta device."""
    names = golden.manifest["pulid_flux"]
    settings = find_recipe("flux2_klein_stage3")
    with init_empty_weights():
        transformer = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680
        )
        state: dict[str, Tensor] = {
            name: torch.empty(shape, device="meta") for name, shape in names.items()
        }
        published = PuLIDFlux.from_state_dict(state, IDFormer())
        adapter = transfer_adapter(
            published,
            transformer,
            double_interval=settings.double_interval,
            single_interval=settings.single_interval,
        )
    adapter.attach(transformer)
    assert len(adapter.layers) == 8
    assert adapter.layers[0].to_q.weight.shape == (2048, 3072)
    chain = ["flux2_klein_stage3", "flux2_klein_stage2", "flux2_klein_stage1"]
    recipes = [find_recipe(name) for name in chain]
    assert [one.init_from for one in recipes] == [*chain[1:], None]
    assert {one.base for one in recipes} == {"flux2-klein"}


def test_checkpoints_are_loaded_by_their_names(tmp_path: Path) -> None:
    """The few-step model shares text encoder and autoencoder, and has the schedule of its steps."""
    flux2_with_text().save_pretrained(tmp_path / "klein")
    tiny_flux.tiny_pipe().save_pretrained(tmp_path / "flux")
    settings = recipe(KLEIN, **STAGES["stage2"], pixels=SIDE, text_tokens=12)
    klein = str(tmp_path / "klein")
    bases = BASES[settings.base]
    presets = bases.find_presets(settings, klein, [klein])
    device = torch.device("cpu")
    pipes = [load_pipeline(preset, device, torch.float32) for preset in presets]
    base, few_step = bases.create_models(settings, pipes)
    assert isinstance(base, Flux2Model) and isinstance(few_step, Flux2Model)
    assert base.vae is few_step.pipe.vae and base.pipe.text_encoder is few_step.pipe.text_encoder
    assert (base.num_steps, few_step.num_steps) == (50, 4)
    assert base.encode_text(["a portrait"]).embeds.shape == (1, 12, 24)
    names = {preset.models.pipeline for preset in bases.find_presets(settings, None, ())}
    assert names == {"flux2-klein-base", "flux2-klein-distilled"} <= WEIGHTS.keys()

    with pytest.raises(WeightsError, match=r"is a Flux2KleinPipeline; use --preset flux2-kl"):
        load_pipeline(flux(tmp_path / "klein"), device)
    (other,) = bases.find_presets(recipe(KLEIN), str(tmp_path / "flux"), ())
    with pytest.raises(WeightsError, match=r"a FLUX\.2 preset: it is a FluxPipeline"):
        load_pipeline(other, device)
