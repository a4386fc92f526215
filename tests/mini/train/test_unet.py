"""The base's and the student's tasks."""

from __future__ import annotations

import pytest
import torch

from openpulid.mini.data.latents import Latents
from openpulid.mini.models.pipeline import build_pipeline, build_scheduler
from openpulid.mini.models.tokenizer import build_tokenizer
from openpulid.mini.train.distill import (
    STUDENT_TIMESTEPS,
    LightningTask,
    StudentSchedule,
    TeacherTrajectories,
    walk,
)
from openpulid.mini.train.unet import BaseTask, often_middle
from openpulid.training.rng import StepRNG
from tests.support import mini_networks as networks


def small_task(**options) -> BaseTask:
    generator = torch.Generator().manual_seed(0)
    latents = Latents(
        torch.randn(2, 4, 12, 12, generator=generator).half(), torch.ones(2, 1, 12, 12).half()
    )
    options = {"batch": 2, **options}
    return BaseTask(
        networks.small_unet(), networks.small_words(), latents, networks.small_captions(), **options
    )


def test_only_the_unet_trains():
    task = small_task()
    task.losses(StepRNG(0, 0))["diffusion"].backward()
    assert list(task.modules()) == ["unet"]
    assert all(p.grad is not None for p in task.unet.parameters())
    assert all(p.grad is None for p in task.words.parameters())


def test_the_loss_depends_on_the_step_alone():
    task = small_task()
    values = [task.losses(StepRNG(0, step))["diffusion"].item() for step in (0, 1, 0)]
    assert values[0] == values[2] != values[1]


def test_it_learns_two_pictures():
    task = small_task(batch=4)
    optimizer = torch.optim.AdamW(task.unet.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss = task.losses(StepRNG(0, step))["diffusion"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_nearly_clean_times_count_less():
    loud = small_task(gamma=1e9)
    calm = small_task(gamma=1.0)
    # batch 2: one time of the noisy half, where SNR + 1 is near 1, and one of the clean half
    assert calm.losses(StepRNG(0, 0))["diffusion"] < loud.losses(StepRNG(0, 0))["diffusion"]


def test_a_step_with_the_students_target_ends_where_the_teacher_was():
    stations, generator = StudentSchedule(), torch.Generator().manual_seed(0)
    sampler = type(build_scheduler()).from_config(build_scheduler().config, solver_order=1)
    sampler.set_timesteps(STUDENT_TIMESTEPS)
    here, there = torch.randn(2, 1, 4, 12, 12, generator=generator)
    for index, t in enumerate(sampler.timesteps):
        wanted = stations.target(here, there, torch.tensor([index]))
        assert torch.allclose(sampler.step(wanted, t, here).prev_sample, there, atol=1e-5)


def test_a_walk_is_the_pipelines_own_way():
    unet, words, vae = networks.small_unet(), networks.small_words(), networks.small_vae()
    pipe = build_pipeline(unet, vae, words, build_tokenizer())
    noise = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    tokens = networks.small_captions().rows(torch.tensor([0, 1]), torch.tensor([0, 0]))
    passed = walk(unet, noise, words(tokens), words(tokens, torch.zeros(2)), steps=8, guidance=3.0)
    prompts = [networks.PROMPTS[0], networks.PROMPTS[2]]
    ended = pipe(
        prompts, latents=noise, num_inference_steps=8, guidance_scale=3.0, output_type="latent"
    ).images
    assert passed.shape == (2, 5, 4, 12, 12)
    assert torch.allclose(passed[:, -1], ended, atol=1e-4)


@pytest.mark.parametrize("teacher", [2, 4])
def test_walks_go_on_where_they_stopped(tmp_path, teacher):
    words, captions = networks.small_words(), networks.small_captions()
    whole = TeacherTrajectories.of(
        networks.small_unet(), words, captions, 4, tmp_path / "whole", batch=2
    )

    class Stopped(Exception):
        pass

    def stop(done, total):
        raise Stopped

    with pytest.raises(Stopped):
        TeacherTrajectories.of(
            networks.small_unet(teacher),
            words,
            captions,
            4,
            tmp_path / "parts",
            batch=2,
            on_progress=stop,
        )
    later: list[int] = []
    note = lambda done, total: later.append(done)  # noqa: E731
    parts = TeacherTrajectories.of(
        networks.small_unet(), words, captions, 4, tmp_path / "parts", batch=2, on_progress=note
    )
    assert later == ([4] if teacher == 2 else [2, 4])  # another teacher's walks are not mixed in
    assert (parts.stations == whole.stations).all() and (parts.tokens == whole.tokens).all()


def test_the_student_trains(tmp_path):
    words, captions = networks.small_words(), networks.small_captions()
    walks = TeacherTrajectories.of(networks.small_unet(), words, captions, 4, tmp_path, batch=4)
    task = LightningTask(networks.small_unet(), words, walks, batch=4)
    loss = task.losses(StepRNG(0, 0))["step"]
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in task.student.parameters())


def test_times_are_most_often_in_the_middle():
    times = often_middle((torch.arange(4000) + 0.5) / 4000)
    assert times.min() >= 0 and times.max() < 1
    quartiles = times.quantile(torch.tensor([0.25, 0.5, 0.75]))
    # by hand: 0.25 * q + 0.75 * Phi(logit(q) + 0.8) is 0.25, 0.5, 0.75
    assert torch.allclose(quartiles, torch.tensor([0.195, 0.34, 0.53]), atol=0.01)
    assert (times > 0.9).float().mean() > 0.025  # where the first step of every image is made
