"""Detection of losses and gradients that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from openpulid.training.optimizer import FUSED_DEVICES


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
