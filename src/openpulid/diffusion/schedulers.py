"""The samplers of `sampling` as a diffusers scheduler, for use in any of its pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from openpulid.diffusion.sampling import (
    dpmpp_2m_step,
    dpmpp_sde_midpoint,
    dpmpp_sde_step,
    karras_sigmas,
    sdxl_sigmas,
)
from openpulid.errors import OptionError

ALGORITHMS = ("dpmpp_2m", "dpmpp_sde")
PREDICTION_TYPES = ("epsilon", "v_prediction")


class KarrasScheduler(SchedulerMixin, ConfigMixin):
    """DPM++ 2M or DPM++ SDE with Karras sigmas, the two samplers of PuLID v1.1.

    Args:
        num_train_timesteps: length of the base model's training schedule.
        beta_start: first beta of its "scaled linear" schedule.
        beta_end: last beta.
        prediction_type: "epsilon" or "v_prediction".
        rescale_betas_zero_snr: the training schedule ends at a signal-to-noise ratio of zero.
        algorithm: "dpmpp_2m", or "dpmpp_sde", which calls the U-Net twice per step and draws new
            noise from the generator of the request.
        rho: exponent of the noise levels (Karras et al. 2022, equation 5).

    Raises:
        OptionError: the algorithm or the prediction type is unknown.
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
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if algorithm not in ALGORITHMS:
            raise OptionError(
                f"unknown algorithm {algorithm!r}; choose from {', '.join(ALGORITHMS)}."
            )
        if prediction_type not in PREDICTION_TYPES:
            raise OptionError(
                f"unknown prediction type {prediction_type!r}; "
                f"choose from {', '.join(PREDICTION_TYPES)}."
            )
        self.train_sigmas = sdxl_sigmas(
            num_train_timesteps, beta_start, beta_end, rescale_betas_zero_snr
        )
        self.order = 2 if algorithm == "dpmpp_sde" else 1
        self.timesteps: Tensor = torch.arange(num_train_timesteps - 1, -1, -1)
        self.begin_index: int | None = None
        self.step_index: int | None = None
        self.set_timesteps(25)

    @property
    def init_noise_sigma(self) -> Tensor:
        """The factor by which a pipeline multiplies its initial noise."""
        return self.levels[0]

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Compute the noise levels and the nearest training timestep of each.

        Args:
            num_inference_steps: number of steps; "dpmpp_sde" has an additional call between each
                two.
            device: the device of `timesteps`.
        """
        self.num_inference_steps = num_inference_steps
        low = float(self.train_sigmas[0])
        high = float(self.train_sigmas[-1])
        self.sigmas = karras_sigmas(num_inference_steps, low, high, self.config.rho)
        levels = self.sigmas[:-1]
        if self.order == 2:
            midpoints = (self.sigmas[:-2] * self.sigmas[1:-1]).sqrt()
            levels = torch.stack([levels[:-1], midpoints], 1).flatten()
            levels = torch.cat([levels, self.sigmas[-2:-1]])
        self.levels = levels
        distance = levels.log()[:, None] - self.train_sigmas.log()
        self.timesteps = distance.abs().argmin(1).to(device)
        # Image-to-image pipelines call `set_begin_index` after this.
        self.begin_index = None
        self.step_index = None
        self._previous: Tensor | None = None
        self._first_call: tuple[Tensor, Tensor] | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the first call of an image-to-image pipeline."""
        self.begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Divide a sample (B, ...) by sqrt(sigma^2 + 1), as in the training of the U-Net."""
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
        """Advance by one call of the U-Net.

        Args:
            model_output: (B, ...) the U-Net's prediction.
            timestep: not used; the scheduler counts its calls.
            sample: (B, ...) the sample before `scale_model_input`.
            generator: generator of new noise, or a list of one per image.
            return_dict: return a `SchedulerOutput` instead of a tuple.
        """
        assert self.step_index is not None, "a pipeline scales its input before it steps"
        x = sample.float()
        sigma = float(self.levels[self.step_index])
        denoised = self._denoise(model_output.float(), x, sigma)
        advance = self._step_sde if self.order == 2 else self._step_2m
        previous_sample = advance(x, denoised, self.step_index, generator).to(sample.dtype)
        self.step_index += 1
        if not return_dict:
            return (previous_sample,)
        return SchedulerOutput(prev_sample=previous_sample)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise of the levels of `timesteps` (B,) to samples (B, ...).

        An image-to-image pipeline asks for the level at which it begins. Inpainting also asks after
        each step for the level of the next; then the number of calls determines the level, since
        several small levels have the same timestep.
        """
        if self.begin_index is None:
            all_timesteps = self.timesteps.tolist()
            indices = [all_timesteps.index(int(t)) for t in timesteps]
        else:
            index = self.begin_index if self.step_index is None else self.step_index
            indices = [index] * len(timesteps)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        sigma = self.levels[indices].to(original_samples).view(shape)
        return original_samples + sigma * noise

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def _denoise(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        if self.config.prediction_type == "epsilon":
            return x - sigma * output
        return x / (sigma**2 + 1) - output * (sigma / (sigma**2 + 1) ** 0.5)

    def _step_2m(self, x: Tensor, denoised: Tensor, i: int, generator: Any) -> Tensor:
        previous = self._previous
        self._previous = denoised
        return dpmpp_2m_step(x, denoised, previous, self.sigmas, i)

    def _step_sde(self, x: Tensor, denoised: Tensor, i: int, generator: Any) -> Tensor:
        step, is_second_call = divmod(i, 2)
        sigma = self.sigmas[step]
        next_sigma = self.sigmas[step + 1]
        if next_sigma == 0:
            return denoised
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if not is_second_call:
            self._first_call = x, noise
            return dpmpp_sde_midpoint(x, denoised, sigma, next_sigma, noise)
        assert self._first_call is not None
        start, first_noise = self._first_call
        return dpmpp_sde_step(start, denoised, sigma, next_sigma, (first_noise, noise))
