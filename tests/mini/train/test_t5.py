"""T5 learns what CLIP's text encoders know, and FLUX's base is trained on it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from transformers import CLIPTextModel, T5EncoderModel

from openpulid.io.checkpoints import read_metadata
from openpulid.mini.evaluation import image_evaluator
from openpulid.mini.models import build_t5, save_flux_pipeline, save_folder
from openpulid.mini.train import base_stage, build, build_context, flux_stages, t5
from openpulid.pipelines.presets import MINIATURE
from openpulid.training import StepRNG, run
from openpulid.world.dataset import Plan, build_dataset
from tests.support import mini_networks as networks


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openpulid.training.logger.draw_curves", lambda history, path: None)


@pytest.fixture
def task() -> t5.T5Task:
    torch.manual_seed(0)
    tokenizer = networks.build_tokenizer()
    captions = networks.small_captions()
    encoder = build_t5(tokenizer, width=32, layers=1, heads=2)
    return t5.T5Task(encoder, networks.small_words(), tokenizer, captions, captions, batch=64)


def test_training_predicts_the_states_of_clip(task: t5.T5Task, tmp_path: Path) -> None:
    before = dict(task.validate())
    result = run(task, replace(flux_stages.T5_CONFIG, steps=120, warmup=5, bf16=False), tmp_path)
    assert 0.9 < before["error"] < 2  # 1 is the variance of the states
    assert result.metrics["error"] < 0.4
    assert all(parameter.grad is None for parameter in task.text_encoders.parameters())


def test_half_of_the_captions_get_random_colors(task: t5.T5Task) -> None:
    tokenizer = networks.build_tokenizer()
    prompt = "photo, red shirt, short blond hair, plain blue background, smiling"
    ids = tokenizer(prompt, padding="max_length")["input_ids"]
    tokens = torch.tensor([ids] * 2000)
    recolored = task.recolor(tokens, StepRNG(3, 0))
    is_color = torch.isin(tokens, task.colors)
    assert is_color[0].sum() == 3  # red, blond, blue
    assert torch.equal(recolored[~is_color], tokens[~is_color])
    assert torch.isin(recolored[is_color], task.colors).all()
    changed = (recolored != tokens).any(1).float().mean().item()
    assert changed == pytest.approx(0.5, abs=0.05)
    pairs = {tuple(row) for row in recolored[:, is_color[0]][:, [0, 2]].tolist()}
    assert len(pairs) > 100  # almost every color of the shirt with every background


def test_stages_write_t5_and_the_base_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, runs = tmp_path / "weights", tmp_path / "runs"
    pipe = networks.small_flux_pipeline()
    save_flux_pipeline(pipe, tmp_path / "first")
    save_folder(pipe.vae, weights / "pipeline" / "vae")
    words = networks.small_words()
    save_folder(words.first, weights / "pipeline" / "text_encoder")
    save_folder(words.second, weights / "pipeline" / "text_encoder_2")
    build_context.stamp(weights / "pipeline" / "text_encoder_2", {"steps": 7})
    pipe.tokenizer.save_pretrained(weights / "pipeline" / "tokenizer")
    for name in ("attribute-classifier", "detector", "recognition-scorer"):
        shutil.copy(MINIATURE / f"{name}.safetensors", weights)
    build_dataset(runs / "world", Plan(people=4, scenes=3), workers=1, compiled=False)
    for name in ("world-held-out", base_stage.PORTRAITS):
        shutil.copytree(runs / "world", runs / name)

    def build_small_t5(tokenizer: object) -> T5EncoderModel:
        return build_t5(networks.build_tokenizer(), width=32, layers=1, heads=2)

    short = replace(flux_stages.T5_CONFIG, steps=2, warmup=1, bf16=False)
    monkeypatch.setattr(flux_stages, "T5_CONFIG", short)
    monkeypatch.setattr(flux_stages, "build_t5", build_small_t5)
    monkeypatch.setattr(flux_stages, "base_config", lambda seed: replace(short, seed=seed))
    monkeypatch.setattr(flux_stages, "can_compile", lambda device: False)
    monkeypatch.setattr(base_stage, "NUM_PAIRS", 4)
    monkeypatch.setattr(image_evaluator, "NUM_PROMPTS", 2)
    context = build_context.BuildContext(
        runs, weights, torch.device("cpu"), begin=tmp_path / "first"
    )
    assert flux_stages.train_t5(context)["error"] < 2
    assert flux_stages.train_flux_base(context)["attributes_real"] > 0.5

    folder = weights / "flux" / "pipeline"
    for part, steps in (("text_encoder", "7"), ("text_encoder_2", "2"), ("transformer", "2")):
        (file,) = (folder / part).glob("*.safetensors")
        assert read_metadata(file)["steps"] == steps, part
    vae = context.load_vae()
    loaded = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32, vae=vae)
    assert isinstance(loaded.text_encoder, CLIPTextModel)
    trained = loaded.transformer.x_embedder.weight
    assert not torch.equal(trained, pipe.transformer.x_embedder.weight)
    assert torch.allclose(trained, pipe.transformer.x_embedder.weight, atol=0.05)  # begun there


def test_base_selects_t5() -> None:
    assert [stage.name for stage in build.select_stages(["flux-base"])] == ["flux-t5", "flux-base"]
