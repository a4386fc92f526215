"""Noise schedules of diffusion models for training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openpulid.diffusion.sampling import MIN_ALPHA
from openpulid.errors import OptionError

PREDICTIONS = ("epsilon", "v_prediction")


class NoiseSchedule:
    """Variance-preserving schedule of DDPM (arXiv 2006.11239).

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, where a_t is the cumulative product of the alphas.

    Some methods use the variables of the samplers instead: x = x_0 + sigma * noise with
    sigma = sqrt((1 - a_t) / a_t).

    Args:
        alphas: (steps,) a_t, falling from nearly 1 to nearly 0.
        prediction: "epsilon", or "v_prediction": v = sqrt(a_t) eps - sqrt(1 - a_t) x_0
            (arXiv 2202.00512).

    Raises:
        OptionError: the prediction type is unknown.
    """

    def __init__(self, alphas: Tensor, prediction: str = "epsilon") -> None:
        if prediction not in PREDICTIONS:
            raise OptionError(
                f"cannot train a base model that predicts {prediction!r}; "
                f"supported are {' and '.join(PREDICTIONS)}."
            )
        self.alphas = alphas.double()
        self.prediction = prediction

    def sample_timesteps(self, uniform: Tensor, timestep_bias: float = 0.0) -> Tensor:
        """Map uniform random numbers to training timesteps.

        Args:
            uniform: (B,) in [0, 1).
            timestep_bias: the density of timestep t is proportional to t to this power.

        Returns:
            (B,) int64.
        """
        return (uniform.double() ** (1 / (1 + timestep_bias)) * len(self.alphas)).long()

    def spread_timesteps(self, uniform: Tensor) -> Tensor:
        """Map uniform random numbers (B,) to uniform timesteps (B,)."""
        return self.sample_timesteps(uniform)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(a_t) and sqrt(1 - a_t), (B, 1, 1, 1) float32 each on the device of `like`."""
        a = self.alphas[t.cpu()].view(-1, *[1] * (like.ndim - 1))
        return a.sqrt().float().to(like.device), (1 - a).sqrt().float().to(like.device)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t, (B, c, h, w)."""
        signal, sigma = self.coefficients(t, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the model should predict, (B, c, h, w)."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self.coefficients(t, latents)
        return signal * noise - sigma * latents

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert a prediction of the model to an estimate of x_0, (B, c, h, w)."""
        return self._to_x0(prediction, x_t, *self.coefficients(t, x_t))

    def trailing_sigmas(self, steps: int) -> Tensor:
        """Return (steps + 1,) falling sigmas, from the last training timestep to 0.

        The timesteps are evenly spaced ("trailing" spacing).
        """
        timesteps = (torch.arange(steps, 0, -1) * (len(self.alphas) / steps)).round().long() - 1
        return torch.cat([self._sigmas()[timesteps], torch.zeros(1)])

    def initial_sample(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Scale standard normal noise so that x_t of the first step is the noise itself."""
        return noise * (1 + sigmas[0].square()).sqrt().to(noise)

    def denoise(
        self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor
    ) -> Tensor:
        """Estimate x_0 from x = x_0 + sigma * noise with one call of the model.

        Args:
            predict: (x_t, t) -> prediction of the model.
            x: (B, c, h, w).
            sigma: (B,) noise levels.

        Returns:
            (B, c, h, w).
        """
        sigma = sigma.view(-1, *[1] * (x.ndim - 1))
        signal = (1 + sigma.square()).rsqrt()
        x_t = signal * x
        t = self.sigma_to_timestep(sigma.flatten()).to(x.device)
        return self._to_x0(predict(x_t, t), x_t, signal, signal * sigma)

    def sigma_to_timestep(self, sigma: Tensor) -> Tensor:
        """Convert (B,) noise levels to (B,) float32 timesteps, interpolated in log sigma."""
        log_sigmas = self._sigmas().log()
        query = sigma.detach().cpu().log().clamp(log_sigmas[0], log_sigmas[-1])
        upper = torch.searchsorted(log_sigmas, query).clamp(min=1)
        low = log_sigmas[upper - 1]
        high = log_sigmas[upper]
        return upper - 1 + (query - low) / (high - low)

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio a_t / (1 - a_t), (B,) float32 on the device of t."""
        a = self.alphas[t.cpu()]
        return (a / (1 - a)).float().to(t.device)

    def _to_x0(self, prediction: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def _sigmas(self) -> Tensor:
        # a schedule with zero SNR ends at 0, where the noise level would be infinite
        alphas = self.alphas.clamp(min=MIN_ALPHA)
        return ((1 - alphas) / alphas).sqrt().float()
