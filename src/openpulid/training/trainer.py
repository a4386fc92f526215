"""The one training loop. It knows no loss, no model and no data: a `Task` has them, and the loop makes steps.

    result = run(task, Schedule(steps=20_000, lr=3e-4), "runs/mini/finder", minutes=20)

A run that is killed at any moment and started again with the same arguments continues from its last
checkpoint and gives, step for step, the losses of an undisturbed run.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.errors import OptionError, TrainingError
from openpulid.training.checkpointing import (
    EMA,
    TrainingState,
    named_buffers,
    named_parameters,
    write_tensors,
)
from openpulid.training.config import MEASURED_STEPS, StepTimer, TrainerConfig
from openpulid.training.distributed import DistributedContext, signals_noted
from openpulid.training.logger import TrainingLogger
from openpulid.training.muon import Muon
from openpulid.training.precision import autocast, fp32_attention
from openpulid.training.rng import StepRNG, generator_for, microbatch_rngs, recorded

CHECKPOINT = "run.safetensors"
FUSED = ("cpu", "cuda", "mps", "xpu")  # devices with a one-kernel AdamW

Losses = Mapping[str, Tensor]


class Task(Protocol):
    """What is trained, on what, and how one sees that it works."""

    def modules(self) -> Mapping[str, nn.Module]:
        """What trains: set to train(), optimised, averaged and checkpointed. The same keys in every run."""

    def losses(self, draw: StepRNG) -> Losses | Iterator[Losses]:
        """Named scalars whose sum is minimised: means over the rank's part, all randomness from `draw`.

        As a generator they come in parts, and each part's backward pass is done before the next is asked for: the
        activations of one are gone by then, and what is open around a `yield` is open during backward.
        """

    def validate(self) -> Mapping[str, float]:
        """Figures on held-out data; called without gradient, averaged weights in place, modules in eval()."""

    def sheet(self) -> Image.Image | None:
        """A picture a person can judge, under the same conditions as `validate`; or None."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run has to say. Its modules hold the averaged weights."""

    steps: int
    seconds: float
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    folder: Path


def run(
    task: Task,
    schedule: TrainerConfig,
    folder: str | PathLike[str],
    *,
    minutes: float | None = None,
    device: str | torch.device | None = None,
) -> TrainingResult:
    """Trains `task` in `folder`, or continues the run that is there; returns when it is finished.

    `minutes` shortens the run: the number of steps that fit is estimated from the measured speed (again at every
    validation, and when the decay would begin) and kept in the checkpoint, so that the decay takes place.
    `device` moves the modules; without it they stay where they are. Under `accelerate launch` or `torchrun`
    gradients are averaged over the processes, which must have been given the same task.

    On SIGTERM and Ctrl-C the step is finished and saved, then SystemExit or KeyboardInterrupt is raised.
    Raises TrainingError when a loss is not finite (weights, draw and batch of that step lie in the folder),
    when the folder holds another run, or when the last checkpoint cannot be written.
    """
    if schedule.steps < 1 or (minutes is not None and minutes <= 0):
        raise OptionError(
            f"{schedule.steps} steps in {minutes} minutes is no training: both must be positive"
        )
    modules = task.modules()
    if device is not None:
        for module in modules.values():
            module.to(device)
    return _Run(task, modules, schedule, Path(folder), minutes).finish()


def microlosses(task: Task, draw: StepRNG, device: torch.device, bf16: bool) -> Iterator[Losses]:
    """A step's losses, part by part, in training's precision. A part's backward pass belongs into `fp32_attention`."""
    with autocast(device, bf16):
        made = task.losses(draw)
    left = iter([made]) if isinstance(made, Mapping) else made
    while True:
        with autocast(device, bf16):
            part = next(left, None)
        if part is None:
            return
        yield {name: value.float() for name, value in part.items()}


@dataclass
class _Run:
    task: Task
    modules: Mapping[str, nn.Module]
    schedule: TrainerConfig
    folder: Path
    minutes: float | None
    step: int = 0  # finished steps
    validated: int = 0  # the step of the last validation
    before: float = 0.0  # seconds of training before this process
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the losses since the last report
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = list(named_parameters(self.modules).values())
        if not self.parameters:
            raise OptionError(
                "nothing to train: no parameter of the task's modules requires a gradient"
            )
        self.device = self.parameters[0].device
        self.ranks = DistributedContext(self.device)
        self.ranks.same([*self.parameters, *named_buffers(self.modules).values()])
        self.optimizer = self._optimizer()
        self.lagging = isinstance(self.optimizer, torch.optim.AdamW) and _looks_late(self.device)
        self.average = EMA(
            {**named_parameters(self.modules), **named_buffers(self.modules)}, self.schedule.ema
        )
        self.state = TrainingState(self.modules, self.optimizer, self.average)
        self.total = self.schedule.steps
        self.bad = torch.zeros((), device=self.device)
        self.good = torch.zeros(
            (), device=self.device
        )  # steps since the last look without a bad loss
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / CHECKPOINT).exists():
            self._resume()
        if self.ranks.agree(self.step) != self.step:
            raise TrainingError(
                f"{self.folder} is not the folder of the first process: all need the same, with its checkpoint"
            )
        self.looked_at = self.step
        self.begun = self.saved_at = time.monotonic()

    # -- the story --

    def finish(self) -> TrainingResult:
        """Every step that is left, then the averaged weights into the modules."""
        with (
            TrainingLogger(
                self.folder, self.step, self.total, silent=self.ranks.rank > 0
            ) as report,
            signals_noted() as received,
        ):
            self.report = report
            unfinished = (
                self.step < self.total or self.validated != self.step
            )  # a signal may have come in the last step
            self._train(received)
            if unfinished:
                self._validate()
                self._save(last=True)
            self.average.apply()
            for module in self.modules.values():
                module.eval()
            return self._result()

    def _train(self, received: list[int]) -> None:
        self._mode(training=True)
        pace = StepTimer(self.step)
        while self.step < self.total:
            draw = self._step()
            pace.note(self.step, self.seconds)
            if self.step % self.schedule.log_every == 0 or self.step == self.total:
                self._look()
                self._log(draw, pace)
            due = self.step % self.schedule.validate_every == 0 and self.step < self.total
            if self.minutes and (
                due or pace.first_estimate or self.schedule.ends_plateau(self.step, self.total)
            ):
                self._fit(pace, self.minutes)
            if due:
                self._validate()
                self._mode(training=True)
                pace.aside(self.seconds - pace.now)
            if self.ranks.any(bool(received)):
                self._save(last=True)
                self._stop(received[0] if received else signal.SIGTERM)
            if time.monotonic() - self.saved_at >= self.schedule.save_minutes * 60:
                self._save()

    def _step(self) -> StepRNG:
        lr = self.schedule.lr * self.schedule.factor(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        known: dict[str, Tensor] = {}
        for draw in self._draws(self.step):
            for part in self._losses(draw):
                with fp32_attention(self.device, self.schedule.bf16):  # recomputed blocks
                    (torch.stack(list(part.values())).sum() / self.schedule.accumulate).backward()
                self._gather(known, part)
            self._gather(known, draw.figures)
        values = self.ranks.mean(torch.stack(list(known.values())), self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        finite = torch.isfinite(values).all() & torch.isfinite(norm)
        self.bad = torch.maximum(self.bad, (~finite).float())
        self.good += 1 - self.bad
        if self.lagging:
            self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]
        elif self.bad.item():
            self._look()
        self.optimizer.step()
        self.average.update(self.step)
        self.step += 1
        for name, value in zip(known, values, strict=True):
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        return draw

    def _draws(self, step: int, keep: bool = False) -> list[StepRNG]:
        return microbatch_rngs(
            self.schedule.seed,
            step,
            self.ranks.rank,
            self.ranks.world,
            self.schedule.accumulate,
            keep,
        )

    def _gather(self, known: dict[str, Tensor], part: Losses) -> None:
        """Adds a part's share to the step's means."""
        for name, value in part.items():
            known[name] = known.get(name, 0.0) + value.detach().float() / self.schedule.accumulate

    def _losses(self, draw: StepRNG) -> Iterator[Losses]:
        # dropout and whatever else uses torch's own generator also depends on the step alone
        torch.manual_seed(generator_for(draw.seed, draw.step, "global", draw.rank).initial_seed())
        yield from microlosses(self.task, draw, self.device, self.schedule.bf16)

    # -- parts --

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.schedule.optimizer == "muon":
            return Muon(self.parameters, self.schedule.lr, self.schedule.weight_decay)
        matrices = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.schedule.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.schedule.lr, betas=self.schedule.betas,
            fused=self.device.type in FUSED or None,
        )  # fmt: skip

    def _mode(self, *, training: bool) -> None:
        for module in self.modules.values():
            module.train(training)

    @property
    def seconds(self) -> float:
        """Of training, over all resumptions."""
        return self.before + time.monotonic() - self.begun

    def _fit(self, pace: StepTimer, minutes: float) -> None:
        """How many steps the minutes allow, until the tail has begun: then the end is settled."""
        if pace.measured < MEASURED_STEPS or self.schedule.in_tail(self.step, self.total):
            return
        left = pace.fitting(minutes * 60 - self.seconds, self.schedule.validate_every)
        self.total = self.ranks.agree(min(self.schedule.steps, self.step + left))
        if not pace.first_estimate:
            pace.restart()

    def _log(self, draw: StepRNG, pace: StepTimer) -> None:
        means = {name: float(self.sums[name]) / self.counts[name] for name in self.sums}
        self.sums, self.counts = {}, {}
        self.report.losses(
            self.step, self.total, self.seconds, means,
            lr=self.optimizer.param_groups[0]["lr"], samples_per_second=round(draw.samples * pace.speed(), 1),
        )  # fmt: skip

    @torch.no_grad()
    def _validate(self) -> None:
        self.validated = self.step
        if self.ranks.rank == 0:
            self._mode(training=False)
            with self.average.in_place(), autocast(self.device, self.schedule.bf16):
                metrics, sheet = self.task.validate(), self.task.sheet()
            try:
                self.report.metrics(self.step, self.seconds, metrics, sheet)
            except (OSError, TrainingError) as error:  # a full disk: the checkpoint is what counts
                self.report.say(f"{error}; training goes on")
        self.ranks.wait()

    # -- checkpoints and bad ends --

    def _save(self, *, last: bool = False) -> None:
        self._look()
        self.saved_at = time.monotonic()
        if self.ranks.rank:
            return
        facts = {
            "step": self.step, "total": self.total, "validated": self.validated, "seconds": self.seconds,
            "minutes": self.minutes, "schedule": asdict(self.schedule),
        }  # fmt: skip
        try:
            self.state.save(self.folder / CHECKPOINT, facts)
            self.report.write()
        except (OSError, TrainingError) as error:
            if last:
                raise
            self.report.say(f"{error}; training goes on")

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        facts = self.state.load(path)
        if facts["schedule"]["seed"] != self.schedule.seed:
            begun = facts["schedule"]["seed"]
            raise TrainingError(
                f"{path} was begun with seed {begun}, not {self.schedule.seed}: take that, or another folder"
            )
        known = facts["schedule"].get("name", self.schedule.name)
        if known != self.schedule.name:
            raise TrainingError(
                f"{path} is a run of {known}, not of {self.schedule.name}: choose another folder, or begin again with --fresh"
            )
        self.step, self.before = facts["step"], facts["seconds"]
        self.validated = facts.get("validated", self.step)  # older checkpoints do not say
        if self.minutes and self.minutes == facts["minutes"]:
            self.total = min(facts["total"], self.schedule.steps)

    def _look(self) -> None:
        """Stops with everything saved that is needed to see why, if a loss was not finite of late."""
        bad, step = bool(self.bad), self.looked_at + int(self.good)
        self.looked_at = self.step
        self.good.zero_()
        if not bad:
            return
        losses: dict[str, Tensor] = {}
        draws = self._draws(step, keep=True)
        with torch.no_grad():
            for part in (part for draw in draws for part in self._losses(draw)):
                self._gather(losses, part)
        path = self.folder / f"not-finite-step-{step}-rank-{self.ranks.rank}.safetensors"
        values = {name: value.item() for name, value in losses.items()}
        tensors = {
            **{f"batch.{n}": t for n, t in recorded(draws).items()},
            **self.state.weight_tensors(),
        }
        write_tensors(
            path, tensors, {"losses": str(values), "step": step, "schedule": asdict(self.schedule)}
        )
        words = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise TrainingError(
            f"the loss or its gradient is not finite at step {step} ({words}): weights, draw and batch are in {path}, "
            "the last checkpoint is intact; try a lower learning rate or bf16=False"
        )

    def _stop(self, number: int) -> None:
        self.report.say(f"stopped at step {self.step} and saved: the same command continues")
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _result(self) -> TrainingResult:
        last = {
            key: r[key] for r in self.report.history for key in ("losses", "metrics") if key in r
        }
        return TrainingResult(
            self.step, self.seconds, last.get("losses", {}), last.get("metrics", {}), self.folder
        )


def _looks_late(device: torch.device) -> bool:
    """Whether losses are looked at only now and then: waiting for each would leave an accelerator idle. Until then a bad
    one does no harm: a fused update can be told on the device to do nothing (`found_inf`)."""
    return device.type in FUSED and device.type != "cpu"
