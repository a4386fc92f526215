"""Samplers that the package runs only as the steps of a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from openpulid.diffusion.sampling import (
    Denoiser,
    dpmpp_sde_midpoint,
    dpmpp_sde_step,
    sde_midpoint_sigma,
)


def dpmpp_sde(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Callable[[], Tensor]) -> Tensor:
    """Sample with DPM-Solver++ (stochastic), known as "DPM++ SDE".

    Args:
        denoise: called twice per step, once in the last.
        x: (B, ...) noise of standard deviation sigmas[0].
        sigmas: (steps + 1,) falling to 0.
        noise: returns standard normal noise of x's shape; called twice per step.

    Returns:
        (B, ...) the sample.
    """
    for sigma, next_sigma in pairwise(sigmas):
        denoised = denoise(x, sigma.expand(len(x)))
        if next_sigma == 0:
            return denoised
        noises = (noise(), noise())
        x_mid = dpmpp_sde_midpoint(x, denoised, sigma, next_sigma, noises[0])
        denoised_mid = denoise(x_mid, sde_midpoint_sigma(sigma, next_sigma).expand(len(x)))
        x = dpmpp_sde_step(x, denoised_mid, sigma, next_sigma, noises)
    return x
