"""The losses, one class each: equation in the docstring, float32 inside, no logging, no base model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError
from openpulid.training.branches import Denoised, NoiseSchedule


class DiffusionLoss(nn.Module):
    """L_diff = E || eps - eps_theta(x_t, t, C) ||^2 (PuLID, arXiv 2404.16022, equation 1), with the base's
    own target.

    Two options that the paper does not mention, both off by default:

    - min-SNR-gamma (arXiv 2303.09556): the loss at t is weighted so that it counts like min(SNR_t, gamma) on
    x_0, which is
      min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v. Few times dominate no longer.
    - `inside`: positions inside a mask weigh so many times those outside; each picture's weights are divided
    by their mean.

    Args:
        schedule: the base's.
        gamma: of min-SNR, usually 5; None weighs all times alike.
        inside: weight of a position inside the mask, those outside weigh 1.
    """

    def __init__(self, schedule: NoiseSchedule, gamma: float | None = None, inside: float = 1.0) -> None:
        super().__init__()
        if inside <= 0 or (gamma is not None and gamma <= 0):
            raise OptionError(f"gamma {gamma} and inside {inside} are weights: choose positive numbers")
        self.schedule, self.gamma, self.inside = schedule, gamma, inside

    def forward(self, step: Denoised, mask: Tensor | None = None) -> Tensor:
        """The mean over the batch, a scalar. `mask` (B, 1, h, w) is 1 inside, at the size of the latents."""
        return (self.per_sample(step, mask) * self.weight(step.t)).mean()

    def per_sample(self, step: Denoised, mask: Tensor | None = None) -> Tensor:
        """Each picture's mean squared error, (B,), weighted over its positions but not over times."""
        error = (step.output.float() - step.target.float()).square()
        if mask is not None:
            weight = 1.0 + (self.inside - 1.0) * mask.to(error)
            error = error * (weight / weight.mean(dim=(1, 2, 3), keepdim=True))
        return error.flatten(1).mean(1)

    def weight(self, t: Tensor) -> Tensor:
        """(B,) by the time alone."""
        if self.gamma is None:
            return torch.ones(len(t), device=t.device)
        snr = self.schedule.snr(t)
        counted = snr.clamp(max=self.gamma)
        if self.schedule.prediction == "epsilon":
            return counted / snr.clamp(min=torch.finfo(torch.float32).tiny)
        return counted / (snr + 1.0)
