"""Train the base's U-Net, and its four-step student, from latents and text embeddings that stay on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.mini.accelerated.autoencoder import encode
from openpulid.mini.accelerated.scenes import CaptionWriter
from openpulid.mini.accelerated.steps import (
    Average,
    DeviceMuon,
    Losses,
    RepeatedStep,
    TimedSchedule,
    autocast,
    train,
)
from openpulid.mini.accelerated.world import World
from openpulid.mini.models.pipeline import TextEncoders, build_scheduler, build_unet, predict
from openpulid.mini.train.distill import STUDENT_TIMESTEPS, StudentSchedule
from openpulid.mini.train.unet import DROPPED, GUIDANCE, STEPS, often_middle
from openpulid.training.pulid.models import TextConditioning

WIDTHS = (128, 160, 160)
"""Of the U-Net's levels: 13.6 M parameters. A token stands for 192 pixel values, for which 64 was narrow."""
FACE_WEIGHT = 3.0
GAMMA = 5.0
"""As in `BaseTask`: above this signal-to-noise ratio + 1 the loss is scaled down to it."""
CAPTIONS = 2
"""Captions per image."""

Watch = Callable[[int, float, dict[str, float]], None]


@dataclass(frozen=True)
class TrainSet:
    """What a base learns from, N images with V captions each.

    latents (N, C, s, s) and faces (N, 1, s, s), the face's share of each position, float16; tokens (N, V, L)
    uint8; embeds (N, V, L, D) and pooled (N, V, P), bfloat16.
    """

    latents: Tensor
    faces: Tensor
    tokens: Tensor
    embeds: Tensor
    pooled: Tensor
    size: int

    def text(self, rows: Tensor, variants: Tensor) -> TextConditioning:
        """Return what the U-Net is told of captions `variants` (B,) of the images `rows` (B,)."""
        embeds, pooled = self.embeds[rows, variants].float(), self.pooled[rows, variants].float()
        return TextConditioning(embeds, pooled, time_ids(self.size, len(rows), embeds.device))


def time_ids(size: int, count: int, device: torch.device) -> Tensor:
    """Return SDXL's size conditions (count, 6) for square images of `size` pixels."""
    ids = torch.full(
        (6,), float(size), device=device
    )  # no list of values: a graph cannot copy from the CPU
    ids[2:4] = 0.0
    return ids.expand(count, -1)


def for_guidance(text: TextConditioning) -> TextConditioning:
    """Return B texts as 2 B: first those of no words, all zero, then these."""
    assert text.time_ids is not None, "SDXL's base is told sizes"
    embeds, pooled = (torch.cat([torch.zeros_like(x), x]) for x in (text.embeds, text.pooled))
    return TextConditioning(embeds, pooled, torch.cat([text.time_ids, text.time_ids]))


@torch.no_grad()
def prepare(
    vae: PatchAutoencoderKL,
    words: TextEncoders,
    writer: CaptionWriter,
    world: World,
    generator: torch.Generator,
    captions: int = CAPTIONS,
    batch: int = 1024,
) -> TrainSet:
    """Encode all images and captions of a world."""
    count, device = len(world), world.images.device
    made: dict[str, Tensor] = {}
    for rows in torch.arange(count, device=device).split(batch):
        images, masks, _ = world.rows(rows)
        latents = encode(vae, images)
        tokens = torch.stack(
            [writer.write(world.scenes[rows], generator) for _ in range(captions)], 1
        )
        text = words(tokens.flatten(0, 1))
        new = {
            "latents": latents.half(),
            "faces": avg_pool2d(masks, images.shape[-1] // latents.shape[-1]).half(),
            "tokens": tokens.to(torch.uint8),
            "embeds": text.embeds.bfloat16().unflatten(0, (-1, captions)),
            "pooled": text.pooled.bfloat16().unflatten(0, (-1, captions)),
        }
        for name, value in new.items():
            if name not in made:
                made[name] = value.new_zeros(count, *value.shape[1:])
            made[name][rows] = value
    return TrainSet(**made, size=world.images.shape[-1])


class DeviceSchedule:
    """The pipeline's noise schedule as tables on the device."""

    def __init__(self, device: torch.device) -> None:
        alphas = build_scheduler().alphas_cumprod.double()
        self.steps = len(alphas)
        self.signal, self.noise = (
            alphas.sqrt().float().to(device),
            (1 - alphas).sqrt().float().to(device),
        )
        snr = alphas / (1 - alphas)
        self.weight = (GAMMA / (snr + 1)).clamp(max=1.0).float().to(device)

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """(batch,) times, one out of each of `batch` equal spans of the distribution of `often_middle`."""
        spread = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        return (often_middle(spread).double() * self.steps).long()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the image and of the noise at times t (B,), each (B, 1, 1, 1)."""
        return self.signal[t][:, None, None, None], self.noise[t][:, None, None, None]


def fresh_unet(data: TrainSet, words: TextEncoders, widths: tuple[int, ...] = WIDTHS) -> Any:
    """Build an untrained U-Net for these latents and text encoders, on their device."""
    channels, size = data.latents.shape[1], data.latents.shape[-1]
    unet = build_unet(channels, words.width, words.second.config.projection_dim, widths, size=size)
    return unet.to(data.latents.device, memory_format=torch.channels_last)


def base_step(
    network: Any, optimizer: DeviceMuon, data: TrainSet, batch: int
) -> Callable[[], Losses]:
    """Return a training step of the base on `batch` random images: v-prediction, faces weigh more."""
    device = data.latents.device
    schedule = DeviceSchedule(device)
    count, variants = data.tokens.shape[:2]

    def step() -> Losses:
        optimizer.zero_grad()
        rows = torch.randint(count, (batch,), device=device)
        clean, faces = data.latents[rows].float(), data.faces[rows].float()
        text = data.text(rows, torch.randint(variants, (batch,), device=device))
        kept = (torch.rand(batch, device=device) >= DROPPED).float()
        text = TextConditioning(
            text.embeds * kept[:, None, None], text.pooled * kept[:, None], text.time_ids
        )
        t = schedule.draw(batch, device)
        signal, sigma = schedule.coefficients(t)
        noise = torch.randn_like(clean)
        with autocast(device):
            predicted = predict(network, signal * clean + sigma * noise, t, text)
        error = (predicted - (signal * noise - sigma * clean)).square()
        weight = 1 + (FACE_WEIGHT - 1) * faces
        error = error * (weight / weight.mean(dim=(1, 2, 3), keepdim=True))
        loss = (error.mean((1, 2, 3)) * schedule.weight[t]).mean()
        loss.backward()
        norm = optimizer.step()
        return {"diffusion": loss.detach(), "norm": norm.detach()}

    return step


def student_step(
    network: Any, optimizer: DeviceMuon, rollouts: Rollouts, data: TrainSet, batch: int
) -> Callable[[], Losses]:
    """Return a training step of the student: from one timestep of the teacher to the next in a single step."""
    device, stations = data.latents.device, StudentSchedule()
    times = stations.times.to(device)
    signal, sigma = stations.signal.to(device), stations.noise.to(device)

    def step() -> Losses:
        optimizer.zero_grad()
        rows = torch.randint(len(rollouts.latents), (batch,), device=device)
        index = torch.randint(STUDENT_TIMESTEPS, (batch,), device=device)
        before, after = (
            rollouts.latents[rows, index].float(),
            rollouts.latents[rows, index + 1].float(),
        )
        a, s, a_next, s_next = (
            x[:, None, None, None]
            for x in (signal[index], sigma[index], signal[index + 1], sigma[index + 1])
        )
        target = (after - (a_next * a + s_next * s) * before) / (s_next * a - a_next * s)
        with autocast(device):
            predicted = predict(
                network,
                before,
                times[index],
                data.text(rollouts.rows[rows], rollouts.variants[rows]),
            )
        error = (predicted - target).square().mean((1, 2, 3))
        loss = (error * torch.maximum(a**2, s**2).flatten()).mean()
        loss.backward()
        norm = optimizer.step()
        return {"distillation": loss.detach(), "norm": norm.detach()}

    return step


@dataclass(frozen=True)
class Rollouts:
    """The teacher's way from noise to image: latents (N, 5, C, s, s) float16; rows and variants (N,) of the captions."""

    latents: Tensor
    rows: Tensor
    variants: Tensor


@torch.no_grad()
def rollout(
    unet: Any,
    noise: Tensor,
    text: TextConditioning,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    order: int = 2,
    every: int = 5,
) -> Tensor:
    """Sample from noise (B, C, s, s) as the pipeline does; return (B, 1 + steps / every, C, s, s), the image last."""
    sampler = type(build_scheduler()).from_config(build_scheduler().config, solver_order=order)
    sampler.set_timesteps(steps, device=noise.device)
    guided = guidance != 1
    told = text
    if guided:
        told = for_guidance(text)
    x, passed = noise, [noise]
    for index, t in enumerate(sampler.timesteps, 1):
        with autocast(noise.device):
            predicted = predict(
                unet, torch.cat([x, x]) if guided else x, t.expand(len(told.embeds)), told
            )
        if guided:
            without, with_text = predicted.chunk(2)
            predicted = without + guidance * (with_text - without)
        x = sampler.step(predicted, t, x, return_dict=False)[0]
        if index % every == 0:
            passed.append(x)
    return torch.stack(passed, 1)


@torch.no_grad()
def rollouts_of(
    unet: Any, data: TrainSet, count: int, seconds: float, batch: int = 2048
) -> Rollouts:
    """Make up to `count` rollouts of the teacher under guidance, in at most so many seconds."""
    device, shape = data.latents.device, data.latents.shape[1:]
    start = time.monotonic()
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    batch = min(batch, count)
    while len(made) * batch < count and (not made or time.monotonic() - start < seconds):
        rows = torch.randint(len(data.latents), (batch,), device=device)
        variants = torch.randint(data.tokens.shape[1], (batch,), device=device)
        text = data.text(rows, variants)
        passed = rollout(
            unet, torch.randn(batch, *shape, device=device), text, every=STEPS // STUDENT_TIMESTEPS
        )
        made.append((passed.half(), rows, variants))
        if device.type == "cuda":
            torch.cuda.synchronize()
    return Rollouts(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def fit_base(
    unet: Any,
    data: TrainSet,
    seconds: float,
    *,
    network: Any = None,
    captured: bool = False,
    batch: int = 512,
    lr: float = 3e-3,
    most: int | None = None,
    watch: Callable[
        [int, float, dict[str, float], Average], None
    ] = lambda step, share, losses, average: None,
    say: Callable[[str], None] = print,
) -> tuple[int, Any]:
    """Train a base in place; afterwards it holds its averaged weights.

    The seconds include compiling and capturing.

    Args:
        network: the U-Net compiled; captured: repeat the step as a CUDA graph.

    Returns:
        The number of steps, and the network that made them: the U-Net itself where compiling failed.
    """
    unet.train().requires_grad_(True)
    begin = time.monotonic()
    network = unet if network is None else network
    optimizer = DeviceMuon(unet.parameters(), weight_decay=0.1)
    average = Average(unet, 0.997)
    try:
        base_step(network, optimizer, data, batch)()  # at rate 0
    except Exception as error:
        if network is unet:
            raise
        say(f"the U-Net is not compiled: {type(error).__name__}: {str(error)[:500]}")
        network = unet
    step = RepeatedStep(base_step(network, optimizer, data, batch), captured)
    ready = time.monotonic() - begin
    say(
        f"the base's step is ready after {ready:.1f} s, compiled: {network is not unet}, captured: {captured}"
    )
    schedule = TimedSchedule(max(1.0, seconds - ready), lr, warmup=100, decay=0.6)

    def look(index: int, share: float, losses: dict[str, float]) -> None:
        watch(index, share, losses, average)

    steps = train(step, optimizer, average, schedule, most=most, watch=look)
    optimizer.zero_grad()
    average.apply()
    unet.eval()
    return steps, network


def fit_student(
    unet: Any,
    data: TrainSet,
    seconds: float,
    *,
    network: Any = None,
    captured: bool = False,
    count: int = 32768,
    share: float = 0.4,
    batch: int = 512,
    lr: float = 1e-3,
    most: int | None = None,
    watch: Watch = lambda step, share, losses: None,
    say: Callable[[str], None] = print,
) -> int:
    """Turn a trained base into its student, in place: `share` of the seconds make the teacher's rollouts.

    `network` is the base compiled: the student reuses it.
    """
    begin = time.monotonic()
    unet.eval()
    rollouts = rollouts_of(unet, data, count, share * seconds)
    say(f"{len(rollouts.latents)} rollouts in {time.monotonic() - begin:.1f} s")
    unet.train().requires_grad_(True)
    optimizer = DeviceMuon(unet.parameters(), weight_decay=0.01)
    average = Average(unet, 0.995)
    network = unet if network is None else network
    step = RepeatedStep(student_step(network, optimizer, rollouts, data, batch), captured)
    schedule = TimedSchedule(
        max(1.0, seconds - (time.monotonic() - begin)), lr, warmup=50, decay=0.7
    )
    steps = train(step, optimizer, average, schedule, most=most, watch=watch)
    optimizer.zero_grad()
    average.apply()
    unet.eval()
    return steps


def frozen_copy(unet: Any) -> Any:
    """Return a copy without gradients."""
    return deepcopy(unet).eval().requires_grad_(False)
