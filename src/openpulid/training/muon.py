"""Muon: momentum with orthogonalized updates for matrices, and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.device import supports_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration that moves singular values toward 1 (Jordan et al. 2024, "Muon")."""
ITERATIONS = 5
ADAM_RMS = 0.2
"""Root mean square of an AdamW step of rate 1. Updates of this size let both optimizers use the
same learning rates (arXiv 2502.16982)."""
EPSILON = 1e-8


class Muon(torch.optim.Optimizer):
    """Optimizer for networks in which AdamW lets attention collapse.

    AdamW moves every entry of a matrix by the learning rate. A step that points in one direction
    therefore has the norm rate times the root of the matrix's size. Queries and keys that agree in
    a direction grow until the softmax selects a single token, which gets no useful gradient any
    more. A Muon step has the same norm in every direction: common directions cannot run away, and
    rare ones are learned as fast. Convolution kernels count as matrices with one row per output.

    `torch.optim.Muon` needs torch 2.9, takes no kernels and orthogonalizes one matrix at a time.

    Args:
        parameters: or groups of them; those with two or more axes are matrices.
        lr: learning rate, as for AdamW.
        weight_decay: of the matrices, per step and multiplied by `lr`.
        momentum: of the matrices (Nesterov's form).
        betas: of all other parameters (AdamW).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        super().__init__(
            parameters,
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        if closure is not None:
            raise TypeError("Muon does not support a closure: compute the gradients before step()")
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._step_matrices([parameter for parameter in trained if parameter.ndim > 1], group)
            for parameter in trained:
                if parameter.ndim <= 1:
                    self._step_vector(parameter, group)

    def _step_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape together: one large product instead of many small ones."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        for shape, same_shape in by_shape.items():
            directions = torch.stack(
                [self._momentum(matrix, group["momentum"]).flatten(1) for matrix in same_shape]
            )
            size = ADAM_RMS * max(directions.shape[-2:]) ** 0.5
            updates = orthogonalize(directions)
            for matrix, update in zip(same_shape, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update.view(shape).to(matrix.dtype), alpha=-group["lr"] * size)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        gradient = parameter.grad
        assert gradient is not None
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        average = state["exp_avg"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)

    def _step_vector(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        gradient = parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] = state["step"] + 1
        step = state["step"].item()
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**step)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2**step)
        parameter.addcdiv_(mean, square.sqrt().add_(EPSILON), value=-group["lr"])


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move all singular values toward 1 (0.7 to 1.2) and keep the singular vectors.

    Computes in bfloat16 where the device supports it.

    Args:
        matrices: (B, m, n).

    Returns:
        (B, m, n).
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if supports_bf16(matrices.device) else matrices.float()
    is_wide = x.shape[-2] <= x.shape[-1]
    x = x if is_wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        squared = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return x if is_wide else x.mT
