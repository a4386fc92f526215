"""Training tasks of the base model and of its student."""

from __future__ import annotations

import pytest
import torch

from openpulid.mini.data.latents import Latents
from openpulid.mini.models.pipeline import build_pipeline, build_scheduler
from openpulid.mini.models.tokenizer import build_tokenizer
from openpulid.mini.train.base_task import BaseTask, TrainingImages
from openpulid.mini.train.distill import (
    STUDENT_TIMESTEPS,
    LightningTask,
    StudentSchedule,
    TeacherTrajectories,
    compute_trajectories,
)
from openpulid.mini.train.networks import SDXLNetwork, warp_uniform_times
from openpulid.training.rng import StepRNG
from tests.support import mini_networks as networks


def small_task(gamma=5.0, **options) -> BaseTask:
    generator = torch.Generator().manual_seed(0)
    latents = Latents(
        torch.randn(2, 4, 12, 12, generator=generator).half(), torch.ones(2, 1, 12, 12).half()
    )
    options = {"batch": 2, **options}
    return BaseTask(
        SDXLNetwork(networks.small_unet(), networks.small_words(), gamma),
        TrainingImages(latents, networks.small_captions()),
        **options,
    )


def test_only_unet_has_gradients():
    task = small_task()
    task.losses(StepRNG(0, 0))["diffusion"].backward()
    assert list(task.modules()) == ["unet"]
    assert all(p.grad is not None for p in task.network.unet.parameters())
    assert all(p.grad is None for p in task.network.text_encoders.parameters())


def test_loss_is_reproducible_for_a_step():
    task = small_task()
    values = [task.losses(StepRNG(0, step))["diffusion"].item() for step in (0, 1, 0)]
    assert values[0] == values[2] != values[1]


def test_base_task_overfits_two_images():
    task = small_task(batch=4)
    optimizer = torch.optim.AdamW(task.network.unet.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss = task.losses(StepRNG(0, step))["diffusion"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_every_eighth_step_is_one_of_pairs():
    latents = Latents(torch.zeros(2, 4, 12, 20).half(), torch.ones(2, 1, 12, 20).half())
    task = small_task(batch=4, pairs=TrainingImages(latents, networks.small_captions()))
    shapes, sizes = [], []

    def note(unet, args, kwargs):
        shapes.append(tuple(args[0].shape))
        sizes.append(kwargs["added_cond_kwargs"]["time_ids"][0].tolist())

    task.network.unet.register_forward_pre_hook(note, with_kwargs=True)
    for step in range(16):
        task.losses(StepRNG(0, step))
    assert [k for k, shape in enumerate(shapes) if shape == (2, 4, 12, 20)] == [7, 15]
    assert shapes[0] == (4, 4, 12, 12) and sizes[0] == [96, 96, 0, 0, 96, 96]
    assert sizes[7] == [96, 160, 0, 0, 96, 160]


def test_nearly_clean_times_have_lower_weight():
    unweighted = small_task(gamma=1e9).losses(StepRNG(0, 0))["diffusion"]
    weighted = small_task(gamma=1.0).losses(StepRNG(0, 0))["diffusion"]
    # batch 2: one time of the noisy half, where SNR + 1 is near 1, and one of the clean half
    assert weighted < unweighted


def test_student_step_with_target_reaches_teacher_latents():
    schedule = StudentSchedule.for_unet()
    generator = torch.Generator().manual_seed(0)
    sampler = type(build_scheduler()).from_config(build_scheduler().config, solver_order=1)
    sampler.set_timesteps(STUDENT_TIMESTEPS)
    x, x_next = torch.randn(2, 1, 4, 12, 12, generator=generator)
    for index, t in enumerate(sampler.timesteps):
        prediction = schedule.target(x, x_next, torch.tensor([index]))
        assert torch.allclose(sampler.step(prediction, t, x).prev_sample, x_next, atol=1e-5)


def test_trajectory_ends_at_pipeline_output():
    unet = networks.small_unet()
    text_encoders = networks.small_words()
    pipe = build_pipeline(unet, networks.small_vae(), text_encoders, build_tokenizer())
    noise = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    tokens = networks.small_captions().rows(torch.tensor([0, 1]), torch.tensor([0, 0]))
    teacher = SDXLNetwork(unet, text_encoders)
    latents = compute_trajectories(teacher, noise, tokens, steps=8, guidance=3.0)
    prompts = [networks.PROMPTS[0], networks.PROMPTS[2]]
    expected = pipe(
        prompts, latents=noise, num_inference_steps=8, guidance_scale=3.0, output_type="latent"
    ).images
    assert latents.shape == (2, 5, 4, 12, 12)
    assert torch.allclose(latents[:, -1], expected, atol=1e-4)


@pytest.mark.parametrize("teacher", [2, 4])
def test_interrupted_trajectories_resume_for_same_teacher(tmp_path, teacher):
    captions = networks.small_captions()

    def network(seed=2):
        return SDXLNetwork(networks.small_unet(seed), networks.small_words())

    uninterrupted = TeacherTrajectories.build(
        network(), captions, 4, tmp_path / "uninterrupted", batch=2
    )

    class Interrupt(Exception):
        pass

    def interrupt(done, total):
        raise Interrupt

    with pytest.raises(Interrupt):
        TeacherTrajectories.build(
            network(teacher),
            captions,
            4,
            tmp_path / "resumed",
            batch=2,
            on_progress=interrupt,
        )
    done_after_resume: list[int] = []
    resumed = TeacherTrajectories.build(
        network(),
        captions,
        4,
        tmp_path / "resumed",
        batch=2,
        on_progress=lambda done, total: done_after_resume.append(done),
    )
    # Trajectories of another teacher are discarded.
    assert done_after_resume == ([4] if teacher == 2 else [2, 4])
    assert (resumed.latents == uninterrupted.latents).all()
    assert (resumed.tokens == uninterrupted.tokens).all()


def test_student_has_finite_loss_and_gradients(tmp_path):
    student = SDXLNetwork(networks.small_unet(), networks.small_words())
    trajectories = TeacherTrajectories.build(
        student, networks.small_captions(), 4, tmp_path, batch=4
    )
    task = LightningTask(student, trajectories, batch=4)
    loss = task.losses(StepRNG(0, 0))["step"]
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in student.unet.parameters())


def test_times_have_expected_quartiles():
    times = warp_uniform_times((torch.arange(4000) + 0.5) / 4000)
    assert times.min() >= 0 and times.max() < 1
    quartiles = times.quantile(torch.tensor([0.25, 0.5, 0.75]))
    # by hand: 0.25 * q + 0.75 * Phi(logit(q) + 0.8) is 0.25, 0.5, 0.75
    assert torch.allclose(quartiles, torch.tensor([0.195, 0.34, 0.53]), atol=0.01)
    assert (times > 0.9).float().mean() > 0.025  # the first step of every image
