"""Noise schedules and samplers: pure loops over a callable, differentiable, without a model or a progress bar inside.

A denoiser maps (x, sigma) to the denoised x_0 estimate; x has variance sigma^2 on top of the data's, and sigma is (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
Sampler = Callable[[Denoiser, Tensor, Tensor], Tensor]  # (denoise, noise, sigmas) -> sample


def sdxl_sigmas(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """(steps,) noise levels of SDXL's training schedule, rising: "scaled linear" betas."""
    betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0).float()
    return ((1 - kept) / kept) ** 0.5


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """(steps + 1,) falling noise levels, the last one 0 (Karras et al. 2022, equation 5)."""
    ramp = torch.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1)])


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """First-order steps (Karras et al. 2022, algorithm 1 without churn); DDIM (Song et al. 2021) in these variables.

    Args:
        denoise: one call per step.
        x: (B, ...) noise of deviation sigmas[0].
        sigmas: (steps + 1,) falling; ended before 0, what is returned still holds noise of that level.

    Returns:
        (B, ...) the sample.
    """
    for sigma, following in pairwise(sigmas):
        x = torch.lerp(denoise(x, sigma.to(x.device).expand(len(x))), x, (following / sigma).to(x))
    return x


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, in the variables of Karras et al.; the last step is of
    first order.

    Args:
        denoise: one call per step.
        x: (B, ...) noise of deviation sigmas[0].
        sigmas: (steps + 1,) falling, the last one 0.

    Returns:
        (B, ...) the sample.
    """
    before = None
    for i, sigma in enumerate(sigmas[:-1]):
        denoised = denoise(x, sigma.to(x.device).expand(len(x)))
        x = dpmpp_2m_step(x, denoised, before, sigmas, i)
        before = denoised
    return x


def dpmpp_2m_step(
    x: Tensor, denoised: Tensor, before: Tensor | None, sigmas: Tensor, i: int
) -> Tensor:
    """From sigmas[i] to sigmas[i + 1]; `before` is what was denoised at sigmas[i - 1]."""
    sigma, following = sigmas[i], sigmas[i + 1]
    estimate = denoised
    if before is not None and following > 0:
        # extrapolated over the steps' lengths in log sigma
        ratio = (sigmas[i - 1] / sigma).log() / (sigma / following).log()
        estimate = denoised + (denoised - before) / (2 * ratio.to(x.device))
    return torch.lerp(estimate, x, (following / sigma).to(x))


def dpmpp_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Callable[[], Tensor],
    eta: float = 1.0,
    middle: float = 0.5,
) -> Tensor:
    """DPM-Solver++ (stochastic), the sampler "DPM++ SDE": two calls per step, the first to a point in between.

    Args:
        denoise: two calls per step, one in the last.
        x: (B, ...) noise of deviation sigmas[0].
        sigmas: (steps + 1,) falling, the last one 0.
        noise: draws standard normal noise of x's shape, two draws per step; from the request's generator,
            so the seed decides.
        eta: share of the noise that is renewed; 0 is deterministic.
        middle: where between two steps, in log sigma, the first call's point lies.

    Returns:
        (B, ...) the sample.
    """
    for i in range(len(sigmas) - 1):
        sigma, following = sigmas[i], sigmas[i + 1]
        denoised = denoise(x, sigma.to(x.device).expand(len(x)))
        if following == 0:
            return denoised
        near, far = noise(), noise()
        jumped, between = dpmpp_sde_middle(x, denoised, sigma, following, near, eta, middle)
        second = denoise(jumped, between.to(x.device).expand(len(x)))
        x = dpmpp_sde_step(x, denoised, second, sigma, following, (near, far), eta, middle)
    return x


def dpmpp_sde_middle(
    x: Tensor,
    denoised: Tensor,
    sigma: Tensor,
    following: Tensor,
    near: Tensor,
    eta: float = 1.0,
    middle: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The point between two steps, and its noise level."""
    between = sigma ** (1 - middle) * following**middle
    return _jump(x, denoised, sigma, between, near, eta), between


def dpmpp_sde_step(
    x: Tensor,
    denoised: Tensor,
    second: Tensor,
    sigma: Tensor,
    following: Tensor,
    noises: tuple[Tensor, Tensor],
    eta: float = 1.0,
    middle: float = 0.5,
) -> Tensor:
    """From sigma to the following one, after what was denoised there and in between."""
    between = sigma ** (1 - middle) * following**middle
    # both jumps see one Brownian motion: the longer one's noise is that of its two parts
    parts = (
        ((sigma - between) / (sigma - following)).sqrt(),
        ((between - following) / (sigma - following)).sqrt(),
    )
    whole = parts[0].to(x) * noises[0] + parts[1].to(x) * noises[1]
    return _jump(x, torch.lerp(denoised, second, 1 / (2 * middle)), sigma, following, whole, eta)


def _jump(
    x: Tensor, estimate: Tensor, sigma: Tensor, to: Tensor, noise: Tensor, eta: float
) -> Tensor:
    """An ancestral step: deterministic to less noise than wanted, then noise up to `to`."""
    up = torch.minimum(to, eta * (to**2 * (sigma**2 - to**2) / sigma**2).sqrt())
    down = (to**2 - up**2).clamp_min(0).sqrt()
    return torch.lerp(estimate, x, (down / sigma).to(x)) + up.to(x) * noise


SAMPLERS: dict[str, Sampler] = {"euler": euler, "dpmpp_2m": dpmpp_2m}
"""Those that need nothing but a denoiser; `dpmpp_sde` also needs noise."""
