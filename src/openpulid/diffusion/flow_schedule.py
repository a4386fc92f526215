"""Noise schedule of rectified flow models for training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openpulid.errors import OptionError


class FlowSchedule:
    """Straight paths from images to noise (rectified flow, arXiv 2209.03003), as in FLUX.

    x_s = (1 - s) x_0 + s eps at the noise level s in [0, 1], which is also the timestep. The model
    predicts the velocity eps - x_0.

    The samplers of `diffusion.sampling` that take plain Euler steps work in these variables: their
    sample is x_s and their sigma is s.

    Args:
        shift: of the noise levels towards noise (arXiv 2403.03206, equation 23); 1 leaves them as
            they are. It applies to training and sampling.
        logit_mean, logit_std: of the logit-normal distribution from which training draws noise
            levels before the shift (arXiv 2403.03206, equation 19).

    Raises:
        OptionError: shift or logit_std is not positive.
    """

    prediction = "flow"

    def __init__(self, shift: float = 1.0, logit_mean: float = 0.0, logit_std: float = 1.0) -> None:
        if shift <= 0 or logit_std <= 0:
            raise OptionError(f"shift ({shift}) and logit_std ({logit_std}) must be positive.")
        self.shift = shift
        self.logit_mean = logit_mean
        self.logit_std = logit_std

    def sample_timesteps(self, uniform: Tensor, timestep_bias: float = 0.0) -> Tensor:
        """Map uniform random numbers to noise levels.

        Args:
            uniform: (B,) in [0, 1).
            timestep_bias: not supported; the mean of the logit has its place.

        Returns:
            (B,) float32 in (0, 1).

        Raises:
            OptionError: there is a timestep_bias.
        """
        if timestep_bias:
            raise OptionError("flow models have no timestep_bias; set logit_mean instead.")
        tiny = torch.finfo(torch.float32).eps
        normal = torch.special.ndtri(uniform.double().clamp(tiny, 1 - tiny))
        return self._shifted((self.logit_mean + self.logit_std * normal).sigmoid()).float()

    def spread_timesteps(self, uniform: Tensor) -> Tensor:
        """Map uniform random numbers to the noise levels that a sampler visits.

        They do not depend on the distribution of the training.

        Args:
            uniform: (B,) in [0, 1).

        Returns:
            (B,) float32, uniform before the shift.
        """
        return self._shifted(uniform.float())

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_s, (B, c, h, w), at noise levels (B,)."""
        return torch.lerp(latents, noise, _per_image(t, latents))

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the model should predict, (B, c, h, w)."""
        return noise - latents

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert a prediction of the model to an estimate of x_0, (B, c, h, w)."""
        return x_t - _per_image(t, x_t) * prediction

    def trailing_sigmas(self, steps: int) -> Tensor:
        """Return (steps + 1,) falling noise levels from 1 to 0, evenly spaced before the shift."""
        return self._shifted(torch.linspace(1, 0, steps + 1))

    def initial_sample(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Return the sample at the first noise level of a run from standard normal noise."""
        return noise * sigmas[0].to(noise)

    def denoise(
        self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor
    ) -> Tensor:
        """Estimate x_0 from x_s with one call of the model.

        Args:
            predict: (x_s, s) -> prediction of the model.
            x: (B, c, h, w).
            sigma: (B,) noise levels s.

        Returns:
            (B, c, h, w).
        """
        return self.predict_x0(predict(x, sigma.to(x)), x, sigma)

    def _shifted(self, s: Tensor) -> Tensor:
        return self.shift * s / (1 + (self.shift - 1) * s)


def _per_image(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like).view(-1, *[1] * (like.ndim - 1))
