"""A base model and its noise schedule that never wait for the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.mini.accelerated.train_set import TrainSet, add_unconditional
from openpulid.training.pulid import SDXLModel, TextConditioning


class DeviceNoiseSchedule(NoiseSchedule):
    """`NoiseSchedule` with its tables on the device.

    Args:
        alphas: (steps,) see `NoiseSchedule`.
        prediction: see `NoiseSchedule`.
        device: the device of all timesteps and latents.
    """

    def __init__(self, alphas: Tensor, prediction: str, device: torch.device) -> None:
        super().__init__(alphas, prediction)
        self.signal_table = self.alphas.sqrt().float().to(device)
        self.sigma_table = (1 - self.alphas).sqrt().float().to(device)
        self.snr_table = (self.alphas / (1 - self.alphas)).float().to(device)
        self.log_sigmas = self._sigmas().log().to(device)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(a_t) and sqrt(1 - a_t), (B, 1, 1, 1) float32 each."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self.signal_table[t].view(shape), self.sigma_table[t].view(shape)

    def sigma_to_timestep(self, sigma: Tensor) -> Tensor:
        """Convert (B,) noise levels to (B,) float32 timesteps, interpolated in log sigma."""
        table = self.log_sigmas
        query = sigma.detach().to(table).log().clamp(table[0], table[-1])
        upper = torch.searchsorted(table, query).clamp(min=1)
        low = table[upper - 1]
        high = table[upper]
        return upper - 1 + (query - low) / (high - low)

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio a_t / (1 - a_t), (B,) float32."""
        return self.snr_table[t]


class DeviceModel(SDXLModel):
    """A base model whose prompts are numbers of captions in a `TrainSet`.

    The text encoders have encoded these captions beforehand. The number of a caption is
    row * captions per image + variant.
    """

    def __init__(self, pipe: Any, data: TrainSet) -> None:
        super().__init__(pipe)
        self.data = data
        self.schedule = DeviceNoiseSchedule(
            pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type, self.device
        )

    def encode_text(
        self,
        prompts: Any,
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> TextConditioning:
        """Return the encoded captions with these numbers, a sequence of B scalar tensors."""
        numbers = torch.stack(list(prompts))
        variants = self.data.tokens.shape[1]
        text = self.data.text(numbers // variants, numbers % variants)
        return add_unconditional(text) if guided else text
