"""Guidance distillation of FLUX's miniature on tiny random weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from openpulid.io.checkpoints import module_fingerprint, read_metadata
from openpulid.mini.data.latents import Latents
from openpulid.mini.models import save_folder
from openpulid.mini.models.flux import save_flux_pipeline
from openpulid.mini.train import guidance_stage
from openpulid.mini.train.base_task import TrainingImages
from openpulid.mini.train.build import select_stages
from openpulid.mini.train.build_context import PORTRAITS, BuildContext
from openpulid.mini.train.guidance import GuidanceTask, add_guidance_embedding
from openpulid.mini.train.guidance_stage import CONFIG
from openpulid.mini.train.loss_models import GUIDED_TRANSFORMER
from openpulid.mini.train.networks import FluxNetwork
from openpulid.mini.train.stages import STAGES
from openpulid.training import StepRNG, run
from openpulid.world.dataset import Plan, build_dataset
from tests.support import mini_networks as networks

BATCH = 8


def images(seed: int) -> TrainingImages:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, networks.CHANNELS, 12, 12, generator=generator)
    return TrainingImages(
        Latents(latents.half(), torch.ones(2, 1, 12, 12).half()), networks.small_captions()
    )


@pytest.fixture
def task() -> GuidanceTask:
    text_encoders = networks.small_flux_text()
    base = networks.small_flux_pipeline().transformer.requires_grad_(False)
    # the random base hardly reads its prompts; guidance extrapolates what they change
    base.time_text_embed.text_embedder.linear_2.weight.mul_(10)
    torch.manual_seed(0)
    student = add_guidance_embedding(base)
    return GuidanceTask(
        FluxNetwork(student, text_encoders, 12),
        FluxNetwork(base, text_encoders, 12),
        images(0),
        images(1),
        batch=BATCH,
    )


@torch.no_grad()
def predict(network: FluxNetwork, guidance: float | None) -> Tensor:
    x_t = torch.randn(2, networks.CHANNELS, 12, 12, generator=torch.Generator().manual_seed(2))
    text = network.encode_text(networks.small_captions().rows(*2 * [torch.tensor([0, 1])]))
    values = None if guidance is None else torch.full((2,), guidance)
    return network.predict(x_t, torch.tensor([0.3, 0.8]), text, values)


def test_untrained_copy_predicts_what_the_base_does(task: GuidanceTask) -> None:
    expected = predict(task.teacher, None)
    for guidance in (1.0, 2.5, 4.0):
        assert torch.equal(predict(task.student, guidance), expected)
    embedder = task.student.transformer.time_text_embed.guidance_embedder
    torch.nn.init.normal_(embedder.linear_2.weight, std=0.1)
    first, second = (predict(task.student, guidance) for guidance in (1.0, 4.0))
    assert (first - second).abs().max() > 1e-3


def test_target_is_classifier_free_guidance(task: GuidanceTask) -> None:
    teacher = task.predict_with_teacher(task.images, StepRNG(0, 0))
    assert teacher.with_text.shape == (BATCH, networks.CHANNELS, 12, 12)
    change = teacher.with_text - teacher.without_text
    assert change.square().mean() > 1e-3  # the prompt has an effect
    for value in (0.0, 1.0, 4.0):
        guided = teacher.guided(torch.full((BATCH,), value))
        assert torch.allclose(guided, teacher.without_text + value * change, atol=1e-5)
    # an untrained student misses (g - 1) times the change, and g is 1 to 5
    loss = task.losses(StepRNG(0, 0))["guidance"]
    assert 0 < loss < 16 * change.square().flatten(1).mean(1).max()


def test_figures_of_an_untrained_copy(task: GuidanceTask) -> None:
    figures = dict(task.validate())
    expected = {"error_at_1": 0.0, "error_at_2.5": 1.0, "error_at_4": 1.0}
    assert figures == pytest.approx(expected, abs=1e-4)
    assert dict(task.validate()) == figures  # the same images and noise every time


def test_gradient_reaches_only_the_students_transformer(task: GuidanceTask) -> None:
    assert list(task.modules()) == ["transformer"]
    task.losses(StepRNG(0, 0))["guidance"].backward()
    for frozen in (task.teacher.transformer, task.student.text_encoders):
        assert all(parameter.grad is None for parameter in frozen.parameters())
    transformer = task.student.transformer
    embedder = transformer.time_text_embed.guidance_embedder
    for layer in (embedder.linear_2, transformer.proj_out, transformer.x_embedder):
        assert layer.weight.grad.abs().max() > 0
    assert not embedder.linear_1.weight.grad.any()  # behind a layer that is still zero


def test_training_learns_the_guidance_and_the_file_loads(
    task: GuidanceTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openpulid.training.logger.draw_curves", lambda history, path: None)
    base = module_fingerprint(task.teacher.transformer)
    text = module_fingerprint(task.student.text_encoders)
    config = replace(CONFIG, steps=40, lr=3e-3, warmup=2, ema=0.9, bf16=False)
    result = run(task, config, tmp_path / "run")
    # also on images and captions that were not trained
    assert result.metrics["error_at_2.5"] < 0.9
    assert result.metrics["error_at_4"] < 0.9
    assert module_fingerprint(task.teacher.transformer) == base
    assert module_fingerprint(task.student.text_encoders) == text

    save_folder(task.student.transformer, tmp_path / "guided")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "guided", torch_dtype=torch.float32)
    assert loaded.config.guidance_embeds
    student = FluxNetwork(loaded, task.student.text_encoders, 12)
    expected = predict(task.student, 4.0)
    assert torch.allclose(predict(student, 4.0), expected, atol=0.02 * expected.abs().max().item())
    assert not torch.equal(predict(student, 1.0), predict(student, 4.0))


def test_stage_writes_the_guided_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openpulid.training.logger.draw_curves", lambda history, path: None)
    config = replace(CONFIG, steps=2, warmup=1, bf16=False)
    monkeypatch.setattr(guidance_stage, "CONFIG", config)
    monkeypatch.setattr(guidance_stage, "can_compile", lambda device: False)
    weights, runs = tmp_path / "weights", tmp_path / "runs"
    pipe = networks.small_flux_pipeline()
    save_flux_pipeline(pipe, weights / "flux" / "pipeline")
    save_folder(pipe.vae, weights / "pipeline" / "vae")
    pipe.tokenizer.save_pretrained(weights / "pipeline" / "tokenizer")
    build_dataset(runs / "world", Plan(people=4, scenes=3), workers=1, compiled=False)
    for name in ("world-held-out", PORTRAITS):
        shutil.copytree(runs / "world", runs / name)

    context = BuildContext(runs, weights, torch.device("cpu"))
    figures = guidance_stage.train_guided_base(context)
    assert list(figures) == ["error_at_1", "error_at_2.5", "error_at_4"]
    assert context.results["flux-guidance"].metrics == pytest.approx(figures, rel=0.1)
    folder = weights / GUIDED_TRANSFORMER
    loaded = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    assert loaded.config.guidance_embeds
    assert loaded.time_text_embed.guidance_embedder.linear_2.weight.any()  # it has trained
    (file,) = folder.glob("*.safetensors")
    assert read_metadata(file)["steps"] == "2"


def test_stage_is_built_by_its_name_alone() -> None:
    assert [stage.name for stage in select_stages(["flux-guidance"])] == ["flux-guidance"]
    assert "flux-guidance" not in {stage.name for stage in STAGES}
