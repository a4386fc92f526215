"""FLUX's miniature: training of the base and its student, and the stock pipeline."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from openpulid.mini.data.captions import token_ids
from openpulid.mini.data.latents import Latents
from openpulid.mini.models.flux import build_transformer, save_flux_pipeline
from openpulid.mini.models.pipeline import sample
from openpulid.mini.train.base_task import BaseTask, TrainingImages
from openpulid.mini.train.distill import (
    STUDENT_TIMESTEPS,
    LightningTask,
    StudentSchedule,
    TeacherTrajectories,
    compute_trajectories,
)
from openpulid.mini.train.flux_stages import FEW_STEP_LORA
from openpulid.mini.train.networks import FluxNetwork
from openpulid.training import TrainerConfig, run
from openpulid.training.rng import StepRNG
from tests.support import mini_networks as networks

CONFIG = TrainerConfig(
    steps=12, lr=3e-3, optimizer="muon", warmup=2, ema=0.9, validate_every=100, bf16=False
)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openpulid.training.logger.draw_curves", lambda history, path: None)


class Task(BaseTask):
    """Records its steps, and raises at one of them."""

    failing_step = -1

    def losses(self, rng: StepRNG) -> Any:
        self.steps = [*getattr(self, "steps", []), rng.step]
        if rng.step == self.failing_step:
            raise KeyboardInterrupt
        return super().losses(rng)


def network(latent_patch: int = 1) -> FluxNetwork:
    return FluxNetwork(
        networks.small_transformer(networks.CHANNELS // latent_patch**2),
        networks.small_flux_text(),
        12 * latent_patch,
    )


def images(latent_patch: int = 1, width: int = 12) -> TrainingImages:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, networks.CHANNELS, 1, 1, generator=generator).expand(-1, -1, 12, width)
    arranged = Latents(latents.half(), torch.ones(2, 1, 12, width).half()).arrange(latent_patch)
    return TrainingImages(arranged, networks.small_captions())


def mean_loss(task: BaseTask) -> float:
    with torch.no_grad():
        return sum(task.losses(StepRNG(7, step))["diffusion"].item() for step in range(8)) / 8


def trained_state(task: BaseTask) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in task.modules().items()
        for key, value in module.state_dict().items()
    }


def test_untrained_transformer_predicts_zero_and_has_the_size_of_the_miniature() -> None:
    task = BaseTask(network(), images(), batch=4)
    clean = task.images.latents.images.float()
    text = task.network.encode_text(networks.small_captions().rows(*2 * [torch.tensor([0, 1])]))
    assert not task.network.predict(clean, torch.rand(2), text).any()
    with torch.device("meta"):
        full = build_transformer(5, 192, 128)
    assert full.num_parameters() == pytest.approx(11.1e6, rel=0.02)


@pytest.mark.parametrize(("latent_patch", "bf16"), [(1, False), (2, False), (2, True)])
def test_training_lowers_the_loss(
    latent_patch: int, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both precisions on any CPU: one without bfloat16 emulates it."""
    for module in ("muon", "precision"):
        monkeypatch.setattr(f"openpulid.training.{module}.supports_bf16", lambda device: bf16)
    task = BaseTask(
        network(latent_patch), images(latent_patch), images(latent_patch, width=20), batch=8
    )
    before, state = mean_loss(task), trained_state(task)
    run(task, replace(CONFIG, steps=24, bf16=bf16), tmp_path)
    assert mean_loss(task) < 0.93 * before
    assert list(task.modules()) == ["transformer"]  # T5 is trained before
    for name, value in trained_state(task).items():
        is_unused = "context" in name or "added" in name or "add_out" in name
        assert is_unused or not torch.equal(value, state[name]), name


def test_interrupted_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Task(network(), images(), batch=4)
    run(whole, CONFIG, tmp_path / "whole")
    stopped = Task(network(), images(), batch=4)
    stopped.failing_step = 7
    config = replace(CONFIG, save_minutes=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, config, tmp_path / "resumed")
    resumed = Task(network(), images(), batch=4)
    run(resumed, config, tmp_path / "resumed")
    assert resumed.steps == list(range(7, 12))
    for name, value in trained_state(resumed).items():
        assert torch.equal(value, trained_state(whole)[name]), name


@pytest.mark.parametrize("latent_patch", [1, 2])
def test_stock_pipeline_gives_the_same_images(latent_patch: int, tmp_path: Path) -> None:
    pipe = networks.small_flux_pipeline(latent_patch)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipe, name).to(torch.bfloat16).to(torch.float32)  # as the weights are stored
    for parameter in pipe.transformer.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    save_flux_pipeline(pipe, tmp_path)
    shared = {"vae": pipe.vae} if latent_patch == 1 else {}  # that of SDXL's miniature
    assert (tmp_path / "vae").exists() == (not shared)
    loaded = FluxPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, **shared)
    loaded.set_progress_bar_config(disable=True)
    for guidance in (1.0, 3.0):
        expected, found = (
            sample(one, networks.PROMPTS[:2], [5, 6], steps=2, guidance=guidance)
            for one in (pipe, loaded)
        )
        assert expected.shape == (2, 3, 96, 96)
        assert torch.allclose(found, expected, atol=1e-5)
    other = sample(loaded, networks.PROMPTS[2:3], [5], steps=2, guidance=3.0)
    assert (other - found[:1]).abs().max() > 1e-3  # prompts are read


def test_training_and_pipeline_encode_the_same_text() -> None:
    pipe = networks.small_flux_pipeline()
    encoders = networks.small_flux_text()
    tokens = networks.small_captions().rows(torch.tensor([0, 1]), torch.tensor([0, 0]))
    text = encoders(tokens, torch.tensor([True, False]))
    embeds, pooled, _ = pipe.encode_prompt([networks.PROMPTS[0], ""], max_sequence_length=32)
    assert torch.allclose(text.embeds, embeds, atol=1e-6)
    assert torch.allclose(text.pooled, pooled, atol=1e-6)


def test_t5_reads_32_tokens_of_a_long_prompt_and_clip_all() -> None:
    pipe = networks.small_flux_pipeline()
    prompt = "photo, red shirt, short blond hair, " * 4
    tokens = token_ids(pipe.tokenizer, [prompt + "smiling", prompt + "sad"])
    text = networks.small_flux_text()(tokens)
    expected, _, _ = pipe.encode_prompt(
        [prompt], max_sequence_length=pipe.tokenizer_2.model_max_length
    )
    assert text.embeds.shape[1] == 32
    assert torch.allclose(text.embeds, expected.expand_as(text.embeds), atol=1e-6)
    assert not torch.allclose(text.pooled[0], text.pooled[1], atol=1e-6)


def test_trajectory_ends_at_output_of_stock_pipeline() -> None:
    pipe = networks.small_flux_pipeline(2)
    teacher = FluxNetwork(pipe.transformer, networks.small_flux_text(), 24)
    noise = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    tokens = networks.small_captions().rows(torch.tensor([0, 1]), torch.tensor([0, 0]))
    latents = compute_trajectories(teacher, noise, tokens, steps=8, guidance=3.0)
    expected = pipe(
        [networks.PROMPTS[0], networks.PROMPTS[2]],
        negative_prompt=["", ""],
        true_cfg_scale=3.0,
        latents=FluxPipeline._pack_latents(noise, 2, 1, 24, 24),
        num_inference_steps=8,
        height=96,
        width=96,
        max_sequence_length=32,
        output_type="latent",
    ).images
    assert latents.shape == (2, 5, 1, 24, 24)
    packed = FluxPipeline._pack_latents(latents[:, -1], 2, 1, 24, 24)
    assert torch.allclose(packed, expected, atol=1e-4)


def test_student_step_with_target_reaches_teacher_latents() -> None:
    student = network()
    schedule = StudentSchedule.for_network(student)
    assert schedule.times.tolist() == [1.0, 0.75, 0.5, 0.25]
    sampler = student.start_sampler(STUDENT_TIMESTEPS)
    x, x_next = torch.randn(2, 1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    for index, t in enumerate(sampler.timesteps):
        assert student.to_timesteps(t).item() == pytest.approx(schedule.times[index].item())
        prediction = schedule.target(x, x_next, torch.tensor([index]))
        assert torch.allclose(sampler.step(prediction, t, x).prev_sample, x_next, atol=1e-5)


def test_student_learns_from_trajectories(tmp_path: Path) -> None:
    teacher = FluxNetwork(
        networks.small_flux_pipeline().transformer, networks.small_flux_text(), 12
    )
    trajectories = TeacherTrajectories.build(
        teacher, networks.small_captions(), 4, tmp_path / "trajectories", batch=4
    )
    student = FluxNetwork(deepcopy(teacher.transformer), teacher.text_encoders, 12)
    student.transformer.requires_grad_(False).add_adapter(FEW_STEP_LORA)
    before_training = {key: x.clone() for key, x in student.transformer.state_dict().items()}
    task = LightningTask(student, trajectories, batch=8)
    assert list(task.modules()) == ["transformer"]

    def mean_step_loss() -> float:
        with torch.no_grad():
            return sum(task.losses(StepRNG(7, step))["step"].item() for step in range(4))

    before = mean_step_loss()
    run(task, replace(CONFIG, steps=20, optimizer="adamw", lr=1e-2), tmp_path / "run")
    assert mean_step_loss() < 0.95 * before
    for name, value in student.transformer.state_dict().items():
        is_unused = "context" in name or "add_" in name or "added" in name
        trains = "lora" in name and not is_unused
        assert is_unused or torch.equal(value, before_training[name]) != trains, name


def test_noise_levels_have_expected_quartiles() -> None:
    levels = network().sample_timesteps((torch.arange(4000) + 0.5) / 4000)
    # by hand: 0.15 * q + 0.85 * Phi(logit(q) - 0.2) is 0.25, 0.5, 0.75
    assert torch.allclose(
        levels.quantile(torch.tensor([0.25, 0.5, 0.75])),
        torch.tensor([0.375, 0.545, 0.708]),
        atol=0.01,
    )
