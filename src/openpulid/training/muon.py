"""Muon: momentum whose matrices are made orthogonal before they are added, and AdamW for everything that is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.device import supports_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iterations bring singular values near 1 (Jordan et al. 2024, "Muon")."""
ITERATIONS = 5
LIKE_ADAM = 0.2
"""Root mean square of an AdamW step of rate 1; steps of this size let both have the same rates (arXiv 2502.16982)."""
EPSILON = 1e-8


class Muon(torch.optim.Optimizer):
    """For networks in which AdamW lets attention collapse.

    AdamW moves every entry of a matrix by the rate, so a step that points in one direction has the rate times the root of
    the matrix's size as its norm; queries and keys that agree in a direction grow until the softmax picks one token, and
    then nothing teaches them any more. A Muon step has the same norm in every direction: common directions cannot run
    away, and rare ones (an eyelid beside a skin) are learned as fast. Kernels count as matrices, one row for each output.

    `torch.optim.Muon` came with torch 2.9, takes no kernels and orthogonalises one matrix at a time.

    Args:
        parameters: those with two axes or more are matrices.
        lr: as for AdamW.
        weight_decay: of the matrices, per step times lr.
        momentum: of the matrices (Nesterov's form); betas: of the others.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
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
        if closure is not None:
            raise TypeError("gradients are there already: this optimizer takes no closure")
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._step_matrices([parameter for parameter in trained if parameter.ndim > 1], group)
            for parameter in trained:
                if parameter.ndim <= 1:
                    self._step_other(parameter, group)

    def _step_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Those of one shape together: one product of many instead of many small ones."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        for shape, some in by_shape.items():
            towards = torch.stack(
                [self._momentum(matrix, group["momentum"]).flatten(1) for matrix in some]
            )
            size = LIKE_ADAM * max(towards.shape[-2:]) ** 0.5
            for matrix, update in zip(some, orthogonal(towards), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update.view(shape).to(matrix.dtype), alpha=-group["lr"] * size)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        average = state["exp_avg"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)

    def _step_other(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state.update(step=torch.zeros((), dtype=torch.float32), **moments)
        (first, second), state["step"] = group["betas"], state["step"] + 1
        mean = state["exp_avg"].lerp_(gradient, 1 - first) / (1 - first ** state["step"].item())
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - second) / (
            1 - second ** state["step"].item()
        )
        parameter.addcdiv_(mean, square.sqrt().add_(EPSILON), value=-group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """(B, m, n) -> as many with the same singular vectors and singular values of about 1 (0.7 to 1.2).

    In bfloat16 where that pays.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if supports_bf16(matrices.device) else matrices.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        squared = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
