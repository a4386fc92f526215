"""Noise schedules of diffusion models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openpulid.errors import OptionError


class NoiseSchedule:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps with a_t the running product of the alphas (DDPM, arXiv
    2006.11239).

    Args:
        alphas: a_t, (steps,) falling from nearly 1 to nearly 0.
        prediction: "epsilon", or "v_prediction": v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (arXiv 2202.00512).
    """

    def __init__(self, alphas: Tensor, prediction: str = "epsilon") -> None:
        if prediction not in ("epsilon", "v_prediction"):
            raise OptionError(
                f"a base that predicts {prediction!r} cannot be trained on: epsilon or v_prediction"
            )
        self.alphas, self.prediction = alphas.double(), prediction

    def times(self, uniform: Tensor, late: float = 0.0) -> Tensor:
        """(B,) uniform numbers in [0, 1) -> (B,) int64 times of training, as dense as t to the power `late`."""
        return (uniform.double() ** (1 / (1 + late)) * len(self.alphas)).long()

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), each (B, 1, 1, 1) in float32 on the device of `like`."""
        a = self.alphas[t.cpu()].view(-1, *[1] * (like.ndim - 1))
        return a.sqrt().float().to(like.device), (1 - a).sqrt().float().to(like.device)

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, (B, c, h, w)."""
        signal, sigma = self.coefficients(t, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the base should predict, (B, c, h, w)."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self.coefficients(t, latents)
        return signal * noise - sigma * latents

    def x0(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The picture that a prediction means, (B, c, h, w)."""
        return self._picture(predicted, x_t, *self.coefficients(t, x_t))

    def _picture(self, predicted: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return (x_t - sigma * predicted) / signal
        return signal * x_t - sigma * predicted

    # -- in the variables of the samplers: x = x_0 + sigma * noise, with sigma = sqrt((1 - a_t) / a_t) --

    def trailing(self, steps: int) -> Tensor:
        """(steps + 1,) falling sigmas from the last time of training on, in equal spans of time; the last one is 0."""
        times = (torch.arange(steps, 0, -1) * (len(self.alphas) / steps)).round().long() - 1
        return torch.cat([self._sigmas()[times], torch.zeros(1)])

    def denoised(
        self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor
    ) -> Tensor:
        """The picture a base sees in x at noise level sigma (B,), through its `predict(x_t, t)`; (B, c, h, w)."""
        sigma = sigma.view(-1, *[1] * (x.ndim - 1))
        signal = (1 + sigma.square()).rsqrt()
        x_t = signal * x
        return self._picture(
            predict(x_t, self.time(sigma.flatten()).to(x.device)), x_t, signal, signal * sigma
        )

    def time(self, sigma: Tensor) -> Tensor:
        """(B,) noise levels -> (B,) times of training in float32, between two of them where need be."""
        table = self._sigmas().log()
        wanted = sigma.detach().cpu().log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, wanted).clamp(min=1)
        low, high = table[above - 1], table[above]
        return above - 1 + (wanted - low) / (high - low)

    def _sigmas(self) -> Tensor:
        return ((1 - self.alphas) / self.alphas).sqrt().float()

    def snr(self, t: Tensor) -> Tensor:
        """a_t / (1 - a_t), (B,) float32 on the device of t."""
        a = self.alphas[t.cpu()]
        return (a / (1 - a)).float().to(t.device)
