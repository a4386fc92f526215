"""Training steps that a CUDA graph can repeat: no clock, no random number and no rate on the CPU.

A small network on a large accelerator spends most of its time waiting for the next kernel to be launched.
A captured step launches all of its kernels at once. What changes from step to step, the learning rate and
the random numbers, is therefore a tensor on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.training.muon import EPSILON, LIKE_ADAM, orthogonal

Losses = Mapping[str, Tensor]


class DeviceMuon:
    """`training.muon.Muon` with its rate and its counter on the device; the same steps up to rounding.

    Args:
        parameters: those with two axes or more are matrices; the others are trained with AdamW.
        weight_decay: of the matrices, per step times the rate.
        momentum: of the matrices (Nesterov's form); betas: of the others.
        adam: train matrices with AdamW, too.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        adam: bool = False,
    ) -> None:
        every = [parameter for parameter in parameters if parameter.requires_grad]
        self.parameters, self.decay, self.momentum, self.betas = (
            every,
            weight_decay,
            momentum,
            betas,
        )
        device = every[0].device
        self.lr = torch.zeros((), device=device)
        self.count = torch.zeros((), device=device)
        self.by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in every:
            if parameter.ndim > 1 and not adam:
                self.by_shape.setdefault(parameter.flatten(1).shape, []).append(parameter)
        self.averages = {
            shape: torch.zeros(len(some), *shape, device=device)
            for shape, some in self.by_shape.items()
        }
        self.others: list[Tensor] = [
            parameter for parameter in every if parameter.ndim <= 1 or adam
        ]
        self.decayed = [parameter for parameter in self.others if parameter.ndim > 1]
        self.first = [torch.zeros_like(parameter) for parameter in self.others]
        self.second = [torch.zeros_like(parameter) for parameter in self.others]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, clip: float = 1.0) -> Tensor:
        """Clip the gradients to norm `clip`, move the parameters, return the norm before."""
        norm = nn.utils.clip_grad_norm_(self.parameters, clip, foreach=True)
        for shape, some in self.by_shape.items():
            gradient = torch.stack([_gradient(parameter).flatten(1) for parameter in some])
            average = self.averages[shape].lerp_(gradient, 1 - self.momentum)
            towards = orthogonal(gradient.lerp(average, self.momentum)).float()
            towards = towards * (-self.lr * LIKE_ADAM * max(shape) ** 0.5)
            torch._foreach_mul_(some, 1 - self.lr * self.decay)
            steps = [
                step.view(parameter.shape) for step, parameter in zip(towards, some, strict=True)
            ]
            torch._foreach_add_(some, steps)
        if self.others:
            self._step_others()
        return norm

    def _step_others(self) -> None:
        self.count += 1
        gradients = [_gradient(parameter) for parameter in self.others]
        torch._foreach_lerp_(self.first, gradients, 1 - self.betas[0])
        torch._foreach_mul_(self.second, self.betas[1])
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - self.betas[1])
        bias = [1 - beta**self.count for beta in self.betas]
        below = torch._foreach_sqrt(self.second)
        torch._foreach_div_(below, bias[1].sqrt())
        torch._foreach_add_(below, EPSILON)
        steps = torch._foreach_div(self.first, below)
        torch._foreach_mul_(steps, -self.lr / bias[0])
        if self.decayed:
            torch._foreach_mul_(self.decayed, 1 - self.lr * self.decay)
        torch._foreach_add_(self.others, steps)


def _gradient(parameter: Tensor) -> Tensor:
    """Return the gradient; a parameter that took no part in the step has none and stays in place."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Average:
    """Exponential moving average of a module's parameters and buffers."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        state = module.state_dict(keep_vars=True)
        self.decay = decay
        self.live = [tensor for tensor in state.values() if tensor.is_floating_point()]
        self.mean = [tensor.detach().clone() for tensor in self.live]

    @torch.no_grad()
    def update(self, step: int, steps: int = 1) -> None:
        """Update after optimizer step `step` (from 0), for `steps` of them at once."""
        decay = min(self.decay, (1 + step) / (10 + step)) ** steps
        torch._foreach_lerp_(self.mean, [tensor.detach() for tensor in self.live], 1.0 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the weights by their average, for good."""
        torch._foreach_copy_([tensor.detach() for tensor in self.live], self.mean)

    @contextmanager
    def in_place(self) -> Any:
        """Use the average inside the block; restore the weights after it."""
        kept = [tensor.detach().clone() for tensor in self.live]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([tensor.detach() for tensor in self.live], kept)


class RepeatedStep:
    """A training step, captured as a CUDA graph, or called again and again.

    A capture that fails leaves a process whose random numbers and memory no longer work. Hence it is tried in
    another process first (`probe`).

    Args:
        step: makes one training step from what lies on the device; returns named scalars, detached.
        captured: capture it; needs a CUDA device.
    """

    def __init__(self, step: Callable[[], Losses], captured: bool = False) -> None:
        self.step = step
        self.graph: Any = None
        self.losses: dict[str, Tensor] = {}
        if captured:
            self._capture()

    def _capture(self, warm: int = 3) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.losses = dict(self.step())
        self.graph = graph

    def __call__(self) -> Losses:
        """Make one step. Captured, the losses are overwritten by the next one."""
        if self.graph is None:
            return self.step()
        self.graph.replay()
        return self.losses


class TimedSchedule:
    """The learning rate as a function of the share of the seconds that have passed: the run always ends in its tail.

    Args:
        seconds: of the run.
        lr: at its highest; warmup: steps of linear rise; decay: last share of the time with a linear fall to zero.
    """

    def __init__(self, seconds: float, lr: float, warmup: int = 100, decay: float = 0.6) -> None:
        self.seconds, self.lr, self.warmup, self.decay = seconds, lr, warmup, decay
        self.begin = time.monotonic()

    @property
    def share(self) -> float:
        return min(1.0, (time.monotonic() - self.begin) / self.seconds)

    def rate(self, step: int, share: float) -> float:
        return self.lr * min(1.0, (step + 1) / self.warmup, (1 - share) / self.decay)


def train(
    step: RepeatedStep,
    optimizer: DeviceMuon,
    average: Average,
    schedule: TimedSchedule,
    *,
    look_every: int = 20,
    most: int | None = None,
    watch: Callable[[int, float, dict[str, float]], None] = lambda step, share, losses: None,
    until: float = 1.0,
    first: int = 0,
    average_every: int = 4,
) -> int:
    """Repeat the step until the schedule's time is over; return the number of steps.

    Args:
        look_every: steps between two looks at the clock and the losses, where the device is waited for.
        most: the most steps; watch: called at every look with step, share of the time and losses.
        until: stop at this share of the time; first: the number of the first step.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    index, share = first, schedule.share
    look_every = min(look_every, most or look_every)
    while share < until and (most is None or index < most):
        optimizer.lr.fill_(schedule.rate(index, share))
        losses = step()
        index += 1
        if index % average_every == 0:
            average.update(index, average_every)
        if index % look_every == 0 or index == most:
            seen = {name: float(value) for name, value in losses.items()}
            if any(
                value != value or value in (float("inf"), float("-inf")) for value in seen.values()
            ):
                raise FloatingPointError(f"step {index}: {seen}")
            share = schedule.share
            watch(index, share, seen)
    return index


def autocast(device: torch.device, enabled: bool = True) -> Any:
    """bfloat16 on an accelerator; a CPU's dry run stays in float32."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if enabled and device.type != "cpu"
        else nullcontext()
    )
