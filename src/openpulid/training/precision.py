"""Precision of a training step, and the check that its losses and gradients are finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openpulid.device import supports_bf16
from openpulid.training.optimizer import FUSED_DEVICES


@contextmanager
def autocast(device: torch.device, bf16: bool = True) -> Iterator[None]:
    """Run forward and backward passes in mixed precision: open it around both, and use `backward`.

    Forward passes run in bfloat16 autocast, or in float32 without `bf16` and on devices where
    bfloat16 does not pay off (`supports_bf16`).

    On a CPU, attention stays in float32. PyTorch's fused CPU kernel takes three to five times as
    long in bfloat16 as in float32 when it runs backward, which is 40% of a small U-Net's step. Its
    plain kernel computes bfloat16 inputs in float32. Unlike a function mode, the choice of a kernel
    also holds inside a backward pass, so blocks that gradient checkpointing recomputes take the
    same path as in their forward pass.
    """
    if not (bf16 and supports_bf16(device)):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        if device.type != "cpu":
            yield
            return
        with sdpa_kernel(SDPBackend.MATH):
            yield


def backward(loss: Tensor) -> None:
    """Run the backward pass of a loss inside the `autocast` block that computed it.

    Gradients take the precision of their forward operation. Autocast is off meanwhile, as PyTorch
    recommends, and its cached bfloat16 weights are freed.
    """
    torch.clear_autocast_cache()
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


def can_defer(device: torch.device) -> bool:
    """Return whether the check may wait: on an accelerator, reading a loss each step costs time."""
    return device.type in FUSED_DEVICES and device.type != "cpu"


class FiniteCheck:
    """Finds the first step whose loss or gradient is not finite.

    A deferred check keeps its flag on the device and is read only now and then. Until then a bad
    step does no harm: the fused optimizer skips its update when `found_inf` is set.

    Args:
        optimizer: of the run.
        device: of the losses.
        step: number of finished steps when this process started.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, step: int) -> None:
        self.optimizer = optimizer
        self.is_deferred = isinstance(optimizer, torch.optim.AdamW) and can_defer(device)
        self._start_step = step
        self._failed = torch.zeros((), device=device)
        self._good_steps = torch.zeros((), device=device)

    def update(self, losses: Tensor, gradient_norm: Tensor) -> None:
        """Record a step before the optimizer uses its gradients.

        Args:
            losses: (N,) values of the step.
            gradient_norm: () norm over all gradients.
        """
        is_finite = torch.isfinite(losses).all() & torch.isfinite(gradient_norm)
        self._failed = torch.maximum(self._failed, (~is_finite).float())
        self._good_steps += 1 - self._failed
        if self.is_deferred:
            self.optimizer.found_inf = self._failed  # type: ignore[attr-defined]

    def first_bad_step(self) -> int | None:
        """Return the first step (from 0) that was not finite, or None. Waits for the device."""
        if not self._failed.item():
            return None
        return self._start_step + int(self._good_steps)
