"""FLUX's miniature on tiny random weights: stages of PuLID, presets, and missing weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from openpulid.errors import WeightsError
from openpulid.identity.extractor import MiniExtractor
from openpulid.io.image_grid import to_pil
from openpulid.methods.pulid import PuLIDFlux
from openpulid.mini.evaluation.adapters import find_adapters
from openpulid.mini.evaluation.evaluate import generate_images
from openpulid.mini.evaluation.prompts import sample_prompts
from openpulid.mini.models.flux import TEXT_TOKENS, save_flux_pipeline
from openpulid.mini.models.pipeline import sample, save_folder
from openpulid.mini.train.loss_models import create_model
from openpulid.mini.train.pulid import adapter_file, encoder_config, find_init_adapter
from openpulid.pipelines.factory import load_extractor
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import MINIATURE, find_preset, mini_flux, mini_flux_4step
from openpulid.training.pulid import (
    Recipe,
    Validation,
    build_adapter,
    find_recipe,
    train_adapter,
)
from openpulid.world import Person, Scene, render
from tests.support import mini_networks as networks
from tests.support import tiny_sdxl
from tests.support.flow_training import SIZES

STAGES = ("stage1", "naive", "stage2", "stage3")


def small_recipe(stage: str) -> Recipe:
    recipe = find_recipe(f"mini_flux_{stage}")
    return replace(
        recipe,
        init_from=None,
        encoder_width=16,
        attention_heads=2,
        attention_head_dim=8,
        batch=4,
        few_step_batch=2 if recipe.few_step_batch else 0,
        steps=3,
        warmup=1,
        bf16=False,
    )


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openpulid.training.logger.draw_curves", lambda history, path: None)


def test_recipes_are_those_of_the_miniature_at_every_block() -> None:
    for stage in STAGES:
        sdxl, flux = find_recipe(f"mini_{stage}"), find_recipe(f"mini_flux_{stage}")
        assert flux.is_miniature and flux.is_flow and flux.encoder == "IDFormer"
        assert (flux.batch, flux.lr, flux.steps) == (sdxl.batch, 1e-3, sdxl.steps)
        assert flux.id_loss == sdxl.id_loss
        assert flux.outside_weight == sdxl.outside_weight
        assert flux.init_from == (sdxl.init_from and sdxl.init_from.replace("mini", "mini_flux"))
    assert find_recipe("mini_flux_stage1").logit_mean == 1
    # next to the ID loss, the alignment of stage 3 has a third of SDXL's weight
    flux, sdxl = find_recipe("mini_flux_stage3"), find_recipe("mini_stage3")
    alignment = flux.semantic_weight / flux.id_weight, sdxl.semantic_weight / sdxl.id_weight
    assert alignment == pytest.approx((0.1, 0.3))


@pytest.mark.parametrize(
    ("stage", "bf16"), [*((stage, False) for stage in STAGES), ("stage3", True)]
)
def test_stage_trains_and_loads(
    stage: str, bf16: bool, tmp_path: Path, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both precisions on any CPU: one without bfloat16 emulates it."""
    for module in ("muon", "precision"):
        monkeypatch.setattr(f"openpulid.training.{module}.supports_bf16", lambda device: bf16)
    recipe = replace(small_recipe(stage), bf16=bf16)
    model, student = (create_model(recipe, networks.small_flux_pipeline()) for _ in range(2))
    assert model.latent_shape() == (4, 12, 12)
    adapter = build_adapter(recipe, model, SIZES)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    people = tiny_sdxl.People(4)
    later: dict[str, Any] = {}
    if recipe.few_step_batch:
        later = {"few_step_models": [student], "face_embedder": tiny_sdxl.faces()}
    validation = Validation(people, scorer=tiny_sdxl.faces())
    result = train_adapter(recipe, model, adapter, people, tmp_path, validation=validation, **later)
    assert {"held_out_own", "held_out_none"} <= set(result.metrics)
    assert ("held_out_scorer_sim" in result.metrics) == (stage != "stage1")
    loaded = PuLIDFlux.load(tmp_path / "adapter.safetensors")
    assert len(loaded.layers) == 4  # two double and two single blocks
    assert loaded.layer_sizes() == {"dim_head": 8, "double_interval": 1, "single_interval": 1}
    loaded.check(model.pipe)
    state = loaded.state_dict()
    assert all(not torch.equal(state[name], before[name]) for name in before if "to_out" in name)


def test_files_of_stages_are_in_a_folder_of_their_own(tmp_path: Path) -> None:
    assert adapter_file(tmp_path, "stage1") == tmp_path / "pulid-stage1.safetensors"
    file = adapter_file(tmp_path, "flux-stage1")
    assert file == tmp_path / "flux" / "pulid-stage1.safetensors"
    file.parent.mkdir()
    file.touch()
    assert find_init_adapter("mini_flux_stage1", tmp_path / "runs" / "any", tmp_path) == file
    assert find_adapters("flux", tmp_path, tmp_path) == {"stage1": file}
    assert find_adapters("sdxl", tmp_path, tmp_path) == {}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights whose FLUX base, student and adapter are tiny and random."""
    folder = tmp_path_factory.mktemp("weights")
    for file in MINIATURE.glob("*.safetensors"):
        (folder / file.name).symlink_to(file)
    pipe = networks.small_flux_pipeline()
    save_flux_pipeline(pipe, folder / "flux" / "pipeline")
    save_folder(pipe.vae, folder / "pipeline" / "vae")  # FLUX's pipeline has none
    networks.save_random_lora(pipe.transformer, folder / "flux")
    recipe = small_recipe("stage3")
    extractor = load_extractor(mini_flux(folder), "cpu")
    assert isinstance(extractor, MiniExtractor)
    adapter = build_adapter(recipe, create_model(recipe, pipe), encoder_config(recipe, extractor))
    for layer in adapter.layers:  # untrained, they add nothing
        torch.nn.init.normal_(layer.to_out.weight, std=0.3)
    adapter.save(adapter_file(folder, "flux-stage3"))
    return folder


@pytest.mark.parametrize("preset", [mini_flux, mini_flux_4step])
def test_preset_generates_with_the_stock_pipeline(preset: Any, weights: Path) -> None:
    studio = load(preset(weights).with_defaults(num_inference_steps=2), device="cpu")
    assert type(studio.pipe) is FluxPipeline
    portrait = to_pil(render([Person.from_seed(3)], [Scene()]).image)[0]
    identity = studio.identify([portrait])
    prompt = networks.PROMPTS[0]
    base, shown = (
        studio.generate(prompt, identity=person, seed=5).images[0] for person in (None, identity)
    )
    assert base.size == (96, 96) and base.tobytes() != shown.tobytes()
    guidance = studio.preset.defaults.true_cfg_scale
    assert guidance == (3.0 if preset is mini_flux else 1.0)
    expected = to_pil(sample(studio.pipe, [prompt], [5], steps=2, guidance=guidance))[0]
    assert base.tobytes() == expected.tobytes()


def test_evaluation_generates_what_the_preset_does(weights: Path) -> None:
    studio = load(mini_flux(weights).with_defaults(num_inference_steps=2), device="cpu")
    prompt, _ = sample_prompts(2, 1)
    portrait = to_pil(render([Person.from_seed(3)], [Scene()]).image)[0]
    identity = studio.identify([portrait])
    for identities in (None, [identity]):
        (batch,) = to_pil(generate_images(studio, [[prompt]], identities))
        person = identities and identities[0]
        single = studio.generate(prompt.prompt, identity=person, seed=prompt.seed).images[0]
        assert batch.tobytes() == single.tobytes()


def test_student_is_the_base_with_its_lora(weights: Path) -> None:
    base, student = (
        load(preset(weights), device="cpu").pipe.transformer
        for preset in (mini_flux, mini_flux_4step)
    )
    assert list(student.state_dict()) == list(base.state_dict())  # merged, nothing of peft is left
    changed = {
        name
        for name, value in base.state_dict().items()
        if not torch.equal(value, student.state_dict()[name])
    }
    blocks = {name for name, value in base.named_parameters() if "blocks" in name}
    matrices = {name for name in blocks if base.get_parameter(name).dim() == 2}
    modulation_and_norms = {name for name in matrices if "norm" in name}
    assert changed == matrices - modulation_and_norms


def test_another_transformer_is_used_without_the_lora(weights: Path) -> None:
    transformer = weights / "flux" / "pipeline" / "transformer"
    studio = load(mini_flux_4step(weights), device="cpu", base=transformer)
    expected = FluxTransformer2DModel.from_pretrained(transformer, torch_dtype=torch.float32)
    for name, value in studio.pipe.transformer.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_folder_of_weights_is_a_preset(weights: Path) -> None:
    preset = find_preset(str(weights / "flux"))
    assert preset.models == mini_flux(weights).models


def test_missing_weights_name_the_command(tmp_path: Path) -> None:
    for preset in (mini_flux(tmp_path), mini_flux_4step(tmp_path)):
        with pytest.raises(WeightsError) as caught:
            load(preset, device="cpu")
        message = str(caught.value)
        assert message.startswith(f"preset {preset.name!r} needs weights that are not trained yet")
        assert message.endswith(
            "`pulid mini build flux-stage1 flux-stage2 flux-stage3` trains them."
        )


def test_prompts_have_the_length_of_the_training() -> None:
    pipe = networks.small_flux_pipeline()
    assert mini_flux().defaults.max_sequence_length == pipe.tokenizer_2.model_max_length
    assert find_recipe("mini_flux_stage1").text_tokens == TEXT_TOKENS
