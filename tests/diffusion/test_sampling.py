"""Samplers match the reference implementation and an exact solution, and are differentiable."""

from __future__ import annotations

import pytest
import torch

from openpulid.diffusion.sampling import dpmpp_2m, karras_sigmas, sdxl_sigmas
from tests.support.samplers import dpmpp_sde


def schedule(steps: int) -> torch.Tensor:
    sigmas = sdxl_sigmas()
    return karras_sigmas(steps, float(sigmas[0]), float(sigmas[-1]))


def wavy(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x / (1 + sigma[:, None, None, None] ** 2) * 0.9 + 0.05 * torch.sin(3 * x)


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser of standard normal data."""
    return x / (1 + sigma[:, None] ** 2)


@pytest.mark.parametrize("steps", [4, 5, 25])
def test_karras_sigmas_match_reference(golden, steps: int) -> None:
    torch.testing.assert_close(
        schedule(steps), torch.tensor(golden.manifest["sdxl_karras_sigmas"][str(steps)])
    )


@pytest.mark.parametrize("steps", [4, 25])
def test_dpmpp_2m_matches_reference(golden, steps: int) -> None:
    sigmas = schedule(steps)
    sample = dpmpp_2m(wavy, golden.input("sampler.x", 1, 4, 8, 8) * sigmas[0], sigmas)
    assert golden.error(f"sampler.dpmpp_2m.{steps}", sample) < 1e-4


def test_dpmpp_2m_converges_to_exact_solution() -> None:
    """For normal data the flow preserves x / sqrt(1 + sigma^2)."""
    noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (10, 40):
        sigmas = schedule(steps)
        x = noise * (1 + sigmas[0] ** 2).sqrt()
        errors.append(float((dpmpp_2m(gaussian, x, sigmas) - noise).abs().max()))
    assert errors[1] < 0.02 and errors[1] < errors[0] / 3


def test_dpmpp_sde_preserves_distribution_and_is_seeded() -> None:
    sigmas, n = schedule(20), 20_000

    def run(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 1, generator=generator) * (1 + sigmas[0] ** 2).sqrt()
        return dpmpp_sde(gaussian, x, sigmas, lambda: torch.randn(n, 1, generator=generator))

    first = run(0)
    assert torch.equal(first, run(0)) and not torch.equal(first, run(1))
    assert abs(float(first.mean())) < 0.02 and abs(float(first.std()) - 1) < 0.03


@pytest.mark.parametrize("sampler", ["2m", "sde"])
def test_samplers_are_differentiable(sampler: str) -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    sigmas, x = schedule(4), torch.ones(2, 1)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return weight * gaussian(x, sigma)

    sample = (
        dpmpp_2m(denoise, x, sigmas)
        if sampler == "2m"
        else dpmpp_sde(denoise, x, sigmas, lambda: torch.zeros_like(x))
    )
    sample.sum().backward()
    assert weight.grad is not None and weight.grad.isfinite() and weight.grad != 0
