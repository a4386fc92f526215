"""Noise schedules and samplers: pure loops over a callable, differentiable, without a model inside.

A denoiser maps (x, sigma) to an estimate of x_0; x is x_0 plus noise of standard deviation sigma,
and sigma is (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
Sampler = Callable[[Denoiser, Tensor, Tensor], Tensor]  # (denoise, noise, sigmas) -> sample


MIN_ALPHA = 2.0**-24
"""Cumulative alpha of a timestep without any signal. It is not zero, so that its noise level is
finite; diffusers' schedulers have the same value."""


def sdxl_sigmas(
    steps: int = 1000, first: float = 0.00085, last: float = 0.012, zero_snr: bool = False
) -> Tensor:
    """Return (steps,) rising noise levels of SDXL's training schedule ("scaled linear" betas).

    Args:
        steps: number of training timesteps.
        first: first beta.
        last: last beta.
        zero_snr: rescale the schedule so that nothing of the image is left at its end
            (arXiv 2305.08891, algorithm 1).
    """
    betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    if zero_snr:
        signal = alphas.sqrt()
        alphas = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
        alphas[-1] = MIN_ALPHA
    alphas = alphas.float()
    return ((1 - alphas) / alphas) ** 0.5


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Return (steps + 1,) falling noise levels that end at 0 (Karras et al. 2022, equation 5)."""
    ramp = torch.linspace(0, 1, steps)
    low = sigma_min ** (1 / rho)
    high = sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1)])


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Sample with first-order steps (Karras et al. 2022, algorithm 1 without churn).

    This is DDIM (Song et al. 2021) in these variables.

    Args:
        denoise: called once per step.
        x: (B, ...) noise of standard deviation sigmas[0].
        sigmas: (steps + 1,) falling. If they end before 0, the result still holds noise of that
            level.

    Returns:
        (B, ...) the sample.
    """
    for sigma, next_sigma in pairwise(sigmas):
        denoised = denoise(x, sigma.to(x.device).expand(len(x)))
        x = torch.lerp(denoised, x, (next_sigma / sigma).to(x))
    return x


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Sample with DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) in the variables of Karras et al.

    The last step is of first order.

    Args:
        denoise: called once per step.
        x: (B, ...) noise of standard deviation sigmas[0].
        sigmas: (steps + 1,) falling to 0.

    Returns:
        (B, ...) the sample.
    """
    previous = None
    for i, sigma in enumerate(sigmas[:-1]):
        denoised = denoise(x, sigma.to(x.device).expand(len(x)))
        x = dpmpp_2m_step(x, denoised, previous, sigmas, i)
        previous = denoised
    return x


def dpmpp_2m_step(
    x: Tensor, denoised: Tensor, previous: Tensor | None, sigmas: Tensor, i: int
) -> Tensor:
    """Step from sigmas[i] to sigmas[i + 1].

    Args:
        x: (B, ...) at sigmas[i].
        denoised: (B, ...) the denoiser's output at sigmas[i].
        previous: its output at sigmas[i - 1]; None in the first step.
        sigmas: (steps + 1,) falling to 0.
        i: the step.
    """
    sigma = sigmas[i]
    next_sigma = sigmas[i + 1]
    estimate = denoised
    if previous is not None and next_sigma > 0:
        # Extrapolate with the ratio of the step lengths in log sigma.
        ratio = (sigmas[i - 1] / sigma).log() / (sigma / next_sigma).log()
        estimate = denoised + (denoised - previous) / (2 * ratio.to(x.device))
    return torch.lerp(estimate, x, (next_sigma / sigma).to(x))


def dpmpp_sde_midpoint(
    x: Tensor, denoised: Tensor, sigma: Tensor, next_sigma: Tensor, noise: Tensor
) -> Tensor:
    """Step to the point halfway between sigma and next_sigma, in log sigma."""
    return _ancestral_step(x, denoised, sigma, sde_midpoint_sigma(sigma, next_sigma), noise)


def dpmpp_sde_step(
    x: Tensor,
    denoised: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noises: tuple[Tensor, Tensor],
) -> Tensor:
    """Step from sigma to next_sigma with the denoiser's output at the midpoint.

    This is DPM-Solver++ (stochastic), known as "DPM++ SDE", with the midpoint in the middle of each
    step: there its second-order estimate is the output at the midpoint.

    Args:
        x: (B, ...) at sigma.
        denoised: the denoiser's output at the midpoint.
        sigma: noise level at the start of the step.
        next_sigma: noise level at its end.
        noises: the noise of the first and of the second half of the step.
    """
    sigma_mid = sde_midpoint_sigma(sigma, next_sigma)
    # Both steps use the same Brownian motion: the noise of the longer one is that of its two
    # halves.
    first_share = ((sigma - sigma_mid) / (sigma - next_sigma)).sqrt()
    second_share = ((sigma_mid - next_sigma) / (sigma - next_sigma)).sqrt()
    noise = first_share.to(x) * noises[0] + second_share.to(x) * noises[1]
    return _ancestral_step(x, denoised, sigma, next_sigma, noise)


def sde_midpoint_sigma(sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Return the noise level of the point between two steps of "DPM++ SDE"."""
    return sigma**0.5 * next_sigma**0.5


def _ancestral_step(
    x: Tensor, estimate: Tensor, sigma: Tensor, to: Tensor, noise: Tensor
) -> Tensor:
    """Step deterministically to less noise than `to`, then add noise up to `to`."""
    up = torch.minimum(to, (to**2 * (sigma**2 - to**2) / sigma**2).sqrt())
    down = (to**2 - up**2).clamp_min(0).sqrt()
    return torch.lerp(estimate, x, (down / sigma).to(x)) + up.to(x) * noise


SAMPLERS: dict[str, Sampler] = {"euler": euler, "dpmpp_2m": dpmpp_2m}
"""Samplers that need nothing but a denoiser. "DPM++ SDE" also needs noise, see `schedulers`."""
