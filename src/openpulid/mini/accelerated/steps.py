"""Training steps that a CUDA graph can replay: no clock, random number or learning rate on the CPU.

A small network on a large accelerator spends most of its time waiting for the next kernel to be
launched. A captured step launches all of its kernels at once. Whatever changes from step to step,
such as the learning rate and the random numbers, is therefore a tensor on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.training.muon import ADAM_RMS, EPSILON, orthogonalize

Losses = Mapping[str, Tensor]
OnProgress = Callable[[int, float, dict[str, float]], None]
"""Called with the number of steps, the fraction of the time that has passed, and the losses."""


def ignore_progress(step: int, fraction: float, losses: dict[str, float]) -> None:
    """Do nothing."""


class DeviceMuon:
    """`training.muon.Muon` with its learning rate and step counter on the device.

    The updates are the same up to rounding.

    Args:
        parameters: those with two or more axes are matrices; all other parameters use AdamW.
        weight_decay: of the matrices, per step and multiplied by the learning rate.
        momentum: of the matrices (Nesterov's form).
        betas: of all other parameters (AdamW).
        adam: use AdamW for matrices as well.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        adam: bool = False,
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.betas = betas
        device = self.parameters[0].device
        self.lr = torch.zeros((), device=device)
        self.count = torch.zeros((), device=device)
        self.by_shape: dict[torch.Size, list[Tensor]] = {}
        self.adam_parameters: list[Tensor] = []
        for parameter in self.parameters:
            if parameter.ndim > 1 and not adam:
                self.by_shape.setdefault(parameter.flatten(1).shape, []).append(parameter)
            else:
                self.adam_parameters.append(parameter)
        self.averages = {
            shape: torch.zeros(len(matrices), *shape, device=device)
            for shape, matrices in self.by_shape.items()
        }
        self.decayed = [parameter for parameter in self.adam_parameters if parameter.ndim > 1]
        self.exp_avg = [torch.zeros_like(parameter) for parameter in self.adam_parameters]
        self.exp_avg_sq = [torch.zeros_like(parameter) for parameter in self.adam_parameters]

    def zero_grad(self) -> None:
        """Delete all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, max_norm: float = 1.0) -> Tensor:
        """Clip the gradients to `max_norm` and update the parameters.

        Returns:
            The norm of the gradients before clipping, a scalar.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, max_norm, foreach=True)
        for shape, matrices in self.by_shape.items():
            gradient = torch.stack([_gradient(matrix).flatten(1) for matrix in matrices])
            average = self.averages[shape].lerp_(gradient, 1 - self.momentum)
            directions = orthogonalize(gradient.lerp(average, self.momentum)).float()
            directions = directions * (-self.lr * ADAM_RMS * max(shape) ** 0.5)
            torch._foreach_mul_(matrices, 1 - self.lr * self.weight_decay)
            updates = [
                update.view(matrix.shape)
                for update, matrix in zip(directions, matrices, strict=True)
            ]
            torch._foreach_add_(matrices, updates)
        if self.adam_parameters:
            self._step_adam()
        return norm

    def _step_adam(self) -> None:
        self.count += 1
        gradients = [_gradient(parameter) for parameter in self.adam_parameters]
        torch._foreach_lerp_(self.exp_avg, gradients, 1 - self.betas[0])
        torch._foreach_mul_(self.exp_avg_sq, self.betas[1])
        torch._foreach_addcmul_(self.exp_avg_sq, gradients, gradients, 1 - self.betas[1])
        bias = [1 - beta**self.count for beta in self.betas]
        denominators = torch._foreach_sqrt(self.exp_avg_sq)
        torch._foreach_div_(denominators, bias[1].sqrt())
        torch._foreach_add_(denominators, EPSILON)
        updates = torch._foreach_div(self.exp_avg, denominators)
        torch._foreach_mul_(updates, -self.lr / bias[0])
        if self.decayed:
            torch._foreach_mul_(self.decayed, 1 - self.lr * self.weight_decay)
        torch._foreach_add_(self.adam_parameters, updates)


def _gradient(parameter: Tensor) -> Tensor:
    """Return the gradient, zero for a parameter that was not used in the step."""
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
        """Update after optimizer step `step` (from 0), for the last `steps` steps at once."""
        decay = min(self.decay, (1 + step) / (10 + step)) ** steps
        torch._foreach_lerp_(self.mean, [tensor.detach() for tensor in self.live], 1.0 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the weights by their average permanently."""
        torch._foreach_copy_([tensor.detach() for tensor in self.live], self.mean)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the average inside the block; restore the weights after it."""
        weights = [tensor.detach().clone() for tensor in self.live]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([tensor.detach() for tensor in self.live], weights)


class RepeatedStep:
    """A training step that is captured as a CUDA graph, or called as it is.

    A capture that fails leaves a process whose random numbers and memory no longer work. It is
    therefore tried in another process first (`probe`).

    Args:
        step: runs one training step on data on the device; returns named scalars, detached.
        is_captured: capture the step; requires a CUDA device.
    """

    def __init__(self, step: Callable[[], Losses], is_captured: bool = False) -> None:
        self.step = step
        self.graph: Any = None
        self.losses: dict[str, Tensor] = {}
        if is_captured:
            self._capture()

    def _capture(self, warmup_steps: int = 3) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup_steps):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.losses = dict(self.step())
        self.graph = graph

    def __call__(self) -> Losses:
        """Run one step. The next step overwrites the losses of a captured step."""
        if self.graph is None:
            return self.step()
        self.graph.replay()
        return self.losses


class TimedSchedule:
    """Learning rate as a function of the elapsed time, so that it always decays to zero.

    Args:
        seconds: duration of the training.
        lr: maximum learning rate.
        warmup: number of steps of the linear warmup.
        decay: fraction of the time, at the end, in which the rate decays linearly to zero.
    """

    def __init__(self, seconds: float, lr: float, warmup: int = 100, decay: float = 0.6) -> None:
        self.seconds = seconds
        self.lr = lr
        self.warmup = warmup
        self.decay = decay
        self.start = time.monotonic()

    @property
    def fraction(self) -> float:
        """Fraction of the time that has passed, at most 1."""
        return min(1.0, (time.monotonic() - self.start) / self.seconds)

    def rate(self, step: int, fraction: float) -> float:
        """Return the learning rate of a step when this fraction of the time has passed."""
        return self.lr * min(1.0, (step + 1) / self.warmup, (1 - fraction) / self.decay)


def train(
    step: RepeatedStep,
    optimizer: DeviceMuon,
    average: Average,
    schedule: TimedSchedule,
    *,
    check_every: int = 20,
    max_steps: int | None = None,
    on_progress: OnProgress = ignore_progress,
    stop_fraction: float = 1.0,
    first_step: int = 0,
    average_every: int = 4,
) -> int:
    """Repeat a step until the schedule's time has passed.

    Args:
        step: the training step.
        optimizer: its optimizer, whose learning rate is set.
        average: the average of the trained weights, which is updated.
        schedule: the learning rate and the time.
        check_every: number of steps after which the clock and the losses are read. This waits for
            the device.
        max_steps: maximum number of steps.
        on_progress: called at every check.
        stop_fraction: stop after this fraction of the time.
        first_step: number of the first step.
        average_every: number of steps between updates of the average.

    Returns:
        The number of steps, including those before `first_step`.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    index = first_step
    fraction = schedule.fraction
    check_every = min(check_every, max_steps or check_every)
    while fraction < stop_fraction and (max_steps is None or index < max_steps):
        optimizer.lr.fill_(schedule.rate(index, fraction))
        losses = step()
        index += 1
        if index % average_every == 0:
            average.update(index, average_every)
        if index % check_every == 0 or index == max_steps:
            values = {name: float(value) for name, value in losses.items()}
            if not all(math.isfinite(value) for value in values.values()):
                raise FloatingPointError(f"a loss is not finite at step {index}: {values}")
            fraction = schedule.fraction
            on_progress(index, fraction, values)
    return index


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a bfloat16 autocast block on an accelerator; a CPU computes in float32."""
    if device.type == "cpu":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
