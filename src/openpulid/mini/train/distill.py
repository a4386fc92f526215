"""Training of the 4-step student: one round of progressive distillation (Salimans & Ho, arXiv 2202.00512).

The teacher is the base with guidance. It walks from noise to pictures in small steps, and what it passes on the way is
kept; the student learns to reach each of four stations from the one before in a single step, without guidance. Kept walks
cost the teacher's steps once, while the student sees each of them several times. The student must be sampled as it was
taught: four first-order steps in trailing spacing, guidance 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor, nn

from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.io.checkpoints import module_fingerprint
from openpulid.mini.data.captions import Captions
from openpulid.mini.models.pipeline import TextEncoders, build_scheduler, predict
from openpulid.mini.train.unet import GUIDANCE, STEPS, ImageEvaluator
from openpulid.training.pulid.models import TextConditioning
from openpulid.training.rng import StepRNG, generator_for

STUDENT_TIMESTEPS = 4
"""Steps of the student."""


class TeacherTrajectories:
    """The teacher's walks: stations (N, 5, C, s, s) float16 from noise to picture, and the sentences' tokens (N, L) uint8."""

    def __init__(self, stations: np.ndarray, tokens: np.ndarray) -> None:
        self.stations, self.tokens = stations, tokens

    @classmethod
    def of(
        cls,
        unet: Any,
        words: TextEncoders,
        captions: Captions,
        count: int,
        folder: Path,
        batch: int = 64,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> TeacherTrajectories:
        """`count` walks, or those still missing in `folder`, where they are kept; the same for the same teacher and seed."""
        folder.mkdir(parents=True, exist_ok=True)
        size, channels = unet.config.sample_size, unet.config.in_channels
        shapes = {"stations": ((count, STUDENT_TIMESTEPS + 1, channels, size, size), np.float16),
                  "tokens": ((count, captions.tokens.shape[-1]), np.uint8)}  # fmt: skip
        marks, mark = folder / "walked.json", [module_fingerprint(unet), count, seed]
        known = json.loads(marks.read_text()) if marks.exists() else {}
        first = known["walked"] if known.get("mark") == mark else 0
        mode = "r+" if first else "w+"
        files = {
            name: open_memmap(folder / f"{name}.npy", mode, dtype, shape)
            for name, (shape, dtype) in shapes.items()
        }
        device = next(unet.parameters()).device
        for start in range(first, count, batch):
            rows = slice(start, min(start + batch, count))
            generator = generator_for(seed, "walks", start)
            chosen = torch.randint(len(captions.tokens), (rows.stop - start,), generator=generator)
            variants = torch.randint(captions.tokens.shape[1], chosen.shape, generator=generator)
            tokens = captions.rows(chosen, variants)
            noise = torch.randn(len(chosen), channels, size, size, generator=generator)
            text, nothing = (
                words(tokens.to(device)),
                words(tokens.to(device), torch.zeros(len(tokens), dtype=torch.bool)),
            )
            passed = walk(unet, noise.to(device), text, nothing)
            files["stations"][rows] = passed.to("cpu", torch.float16).numpy()
            files["tokens"][rows] = tokens.numpy()
            marks.write_text(json.dumps({"mark": mark, "walked": rows.stop}))
            if on_progress:
                on_progress(rows.stop, count)
        return cls(files["stations"], files["tokens"])


@torch.no_grad()
def walk(
    unet: nn.Module,
    noise: Tensor,
    text: TextConditioning,
    nothing: TextConditioning,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """The base's own way from noise (B, C, s, s) under guidance, as the preset samples: (B, 5, C, s, s) at the stations."""
    sampler = build_scheduler()
    sampler.set_timesteps(steps, device=noise.device)
    both = TextConditioning(
        *(torch.cat(pair) for pair in zip(vars(nothing).values(), vars(text).values(), strict=True))
    )
    x, passed = noise, [noise]
    for index, t in enumerate(sampler.timesteps, 1):
        without, with_text = predict(unet, torch.cat([x, x]), t.expand(2 * len(x)), both).chunk(2)
        x = sampler.step(without + guidance * (with_text - without), t, x, return_dict=False)[0]
        if index % (steps // STUDENT_TIMESTEPS) == 0:
            passed.append(x)
    return torch.stack(passed, 1)


class StudentSchedule:
    """The student's four times, and what it must predict to get from one to the next in one deterministic step."""

    def __init__(self) -> None:
        sampler = build_scheduler()
        sampler.set_timesteps(STUDENT_TIMESTEPS)
        self.times = sampler.timesteps.long()  # (4,), falling
        known = NoiseSchedule(sampler.alphas_cumprod, sampler.config.prediction_type).alphas
        kept = torch.cat([known[self.times], torch.ones(1, dtype=known.dtype)])
        self.signal, self.noise = kept.sqrt().float(), (1 - kept).sqrt().float()  # (5,)

    def target(self, here: Tensor, there: Tensor, index: Tensor) -> Tensor:
        """The v-prediction that leads from x at station `index` (B,) to the teacher's x at the next; all (B, C, s, s).

        With x_0 = a x - s v and eps = s x + a v the step ends at a' x_0 + s' eps, solved for v.
        """
        a, s, a_next, s_next = self._coefficients(index, here)
        return (there - (a_next * a + s_next * s) * here) / (s_next * a - a_next * s)

    def weight(self, index: Tensor, like: Tensor) -> Tensor:
        """(B,) truncated signal-to-noise: an error of x_0 counts max(SNR, 1) times (Salimans & Ho, section 4), here of v."""
        a, s, _, _ = self._coefficients(index, like)
        return torch.maximum(a**2, s**2).flatten()

    def _coefficients(self, index: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        table = [
            self.signal[index],
            self.noise[index],
            self.signal[index + 1],
            self.noise[index + 1],
        ]
        return tuple(value.to(like).view(-1, 1, 1, 1) for value in table)


class LightningTask:
    """Trains the student; a `training.loop.Task`.

    Args:
        student: a copy of the base's U-Net.
        words: the text encoders.
        walks: the teacher's.
        examination: with 4 steps of order 1 and guidance 1; None validates nothing.
        batch: stations per step.
        compiled: see `BaseTask`.
    """

    def __init__(
        self,
        student: nn.Module,
        words: TextEncoders,
        walks: TeacherTrajectories,
        examination: ImageEvaluator | None = None,
        batch: int = 48,
        compiled: bool = False,
    ) -> None:
        self.student = student.to(memory_format=torch.channels_last)
        self.network = torch.compile(student) if compiled else student
        self.words, self.walks, self.examination, self.batch = words, walks, examination, batch
        self.stations = StudentSchedule()

    def modules(self) -> Mapping[str, nn.Module]:
        return {"unet": self.student}

    def losses(self, draw: StepRNG) -> Mapping[str, Tensor]:
        device = next(self.student.parameters()).device
        rows = draw.indices(len(self.walks.tokens), self.batch)
        index = draw.randint(STUDENT_TIMESTEPS, rows.shape, "station")
        passed = torch.from_numpy(self.walks.stations[rows.numpy()]).float()
        here, there = (passed[torch.arange(len(rows)), index + k].to(device) for k in (0, 1))
        tokens = torch.from_numpy(self.walks.tokens[rows.numpy()].astype(np.int64)).to(device)
        predicted = predict(
            self.network, here, self.stations.times[index].to(device), self.words(tokens)
        )
        error = (predicted - self.stations.target(here, there, index)).square().flatten(1).mean(1)
        return {"step": (error * self.stations.weight(index, error)).mean()}

    def validate(self) -> Mapping[str, float]:
        return self.examination.figures(self.student, 64) if self.examination else {}

    def sheet(self) -> Image.Image | None:
        return self.examination.sheet(self.student) if self.examination else None
