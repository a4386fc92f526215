"""The samplers of `sampling` as a scheduler of diffusers: any of its pipelines then draws as the reference does."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from openpulid.diffusion.sampling import (
    dpmpp_2m_step,
    dpmpp_sde_middle,
    dpmpp_sde_step,
    karras_sigmas,
    sdxl_sigmas,
)
from openpulid.errors import OptionError

ALGORITHMS = ("dpmpp_2m", "dpmpp_sde")


class KarrasScheduler(SchedulerMixin, ConfigMixin):
    """DPM++ 2M or DPM++ SDE on Karras sigmas (PuLID v1.1's two samplers).

    Args:
        num_train_timesteps, beta_start, beta_end: of the scaled linear schedule that the base was trained on.
        prediction_type: "epsilon" or "v_prediction".
        algorithm: "dpmpp_2m", or "dpmpp_sde": two calls of the U-Net per step and fresh noise from the request's generator.
        rho: of the noise levels (Karras et al. 2022, equation 5).
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction_type: str = "epsilon",
        algorithm: str = "dpmpp_2m",
        rho: float = 7.0,
    ) -> None:
        if algorithm not in ALGORITHMS or prediction_type not in ("epsilon", "v_prediction"):
            raise OptionError(
                f"{algorithm} with {prediction_type}: the algorithms are {', '.join(ALGORITHMS)}."
            )
        self.trained = sdxl_sigmas(num_train_timesteps, beta_start, beta_end)
        self.order = 2 if algorithm == "dpmpp_sde" else 1
        self.timesteps: Tensor = torch.arange(num_train_timesteps - 1, -1, -1)
        self.begin_index: int | None = None
        self.step_index: int | None = None
        self.set_timesteps(25)

    @property
    def init_noise_sigma(self) -> Tensor:
        """What a pipeline multiplies its first noise with."""
        return self.levels[0]

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Noise levels of so many steps, and the trained time nearest to each."""
        self.num_inference_steps = num_inference_steps
        low, high = float(self.trained[0]), float(self.trained[-1])
        self.sigmas = karras_sigmas(num_inference_steps, low, high, self.config.rho)
        levels = self.sigmas[:-1]
        if self.order == 2:  # a point between each two
            between = (self.sigmas[:-2] * self.sigmas[1:-1]).sqrt()
            levels = torch.stack([levels[:-1], between], 1).flatten()
            levels = torch.cat([levels, self.sigmas[-2:-1]])
        self.levels = levels
        distance = levels.log()[:, None] - self.trained.log()
        self.timesteps = distance.abs().argmin(1).to(device)
        self.begin_index = self.step_index = None  # a run that begins later says so itself
        self._before: Tensor | None = None
        self._first: tuple[Tensor, Tensor, Tensor] | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where a pipeline begins that starts from a picture."""
        self.begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """(B, ...) as the U-Net was trained to see it: divided by sqrt(sigma^2 + 1)."""
        if self.step_index is None:
            self.step_index = self.begin_index or 0
        return sample / float((self.levels[self.step_index] ** 2 + 1).sqrt())

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One call of the U-Net further.

        Args:
            model_output, sample: (B, ...), what it said and what it was asked about, before scaling.
            generator: of fresh noise; one, or one per picture.
        """
        assert self.step_index is not None, "a pipeline scales its input before it steps"
        x, sigma = sample.float(), self.levels[self.step_index]
        denoised = self._denoised(model_output.float(), x, float(sigma))
        advance = self._sde if self.order == 2 else self._2m
        further = advance(x, denoised, self.step_index, generator).to(sample.dtype)
        self.step_index += 1
        return SchedulerOutput(prev_sample=further) if return_dict else (further,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, ...) pictures with the noise of the run's `timesteps` (B,) over them.

        A pipeline that begins from a picture asks for the level at which it begins; one that inpaints asks again after each
        step, for the level of the next. Then the run's count tells which that is: small levels share their trained time.
        """
        if self.begin_index is None:
            known = self.timesteps.tolist()
            at = [known.index(int(t)) for t in timesteps]
        else:
            at = [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)
        sigma = self.levels[at].to(original_samples).view(-1, *[1] * (original_samples.ndim - 1))
        return original_samples + sigma * noise

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def _denoised(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        if self.config.prediction_type == "epsilon":
            return x - sigma * output
        return x / (sigma**2 + 1) - output * (sigma / (sigma**2 + 1) ** 0.5)

    def _2m(self, x: Tensor, denoised: Tensor, i: int, generator: Any) -> Tensor:
        before, self._before = self._before, denoised
        return dpmpp_2m_step(x, denoised, before, self.sigmas, i)

    def _sde(self, x: Tensor, denoised: Tensor, i: int, generator: Any) -> Tensor:
        step, second = divmod(i, 2)
        sigma, following = self.sigmas[step], self.sigmas[step + 1]
        if following == 0:
            return denoised
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if not second:
            self._first = x, denoised, noise
            return dpmpp_sde_middle(x, denoised, sigma, following, noise)[0]
        assert self._first is not None
        begun, first, near = self._first
        return dpmpp_sde_step(begun, first, denoised, sigma, following, (near, noise))
