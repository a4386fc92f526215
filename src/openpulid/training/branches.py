"""A base model behind three functions, and the paths through it that a loss can be put on.

A branch needs of a base only that it can read prompts, predict, and decode; whatever else differs between
SDXL, FLUX and their small siblings stays behind `Base`. Shapes: B batch, c x h x w latents, T tokens of width
D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError
from openpulid.training.data import Draw


@dataclass(frozen=True)
class Text:
    """What an SDXL-family base is told: token embeddings (B, T, D), pooled (B, P), size conditioning (B, 6)
    or None."""

    embeds: Tensor
    pooled: Tensor
    time_ids: Tensor | None = None


class NoiseSchedule:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps with a_t the running product of the alphas (DDPM, arXiv
    2006.11239).

    Args:
        alphas: a_t, (steps,) falling from nearly 1 to nearly 0.
        prediction: "epsilon", or "v_prediction": v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (arXiv 2202.00512).
    """

    def __init__(self, alphas: Tensor, prediction: str = "epsilon") -> None:
        if prediction not in ("epsilon", "v_prediction"):
            raise OptionError(f"a base that predicts {prediction!r} cannot be trained on: epsilon or v_prediction")
        self.alphas, self.prediction = alphas.double(), prediction

    def times(self, uniform: Tensor) -> Tensor:
        """(B,) uniform numbers in [0, 1) -> (B,) int64 times of training."""
        return (uniform * len(self.alphas)).long()

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
        signal, sigma = self.coefficients(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * predicted) / signal
        return signal * x_t - sigma * predicted

    def snr(self, t: Tensor) -> Tensor:
        """a_t / (1 - a_t), (B,) float32 on the device of t."""
        a = self.alphas[t.cpu()]
        return (a / (1 - a)).float().to(t.device)


class Base(Protocol):
    """A frozen text-to-image model as training sees it."""

    schedule: NoiseSchedule
    pipe: Any  # what an adapter is attached to

    @property
    def device(self) -> torch.device:
        """Where latents are expected."""

    def encode_text(self, prompts: Sequence[str]) -> Any:
        """B prompts -> whatever `predict` takes; without gradient."""

    def predict(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        """(B, c, h, w) at times t (B,) -> the network's output (B, c, h, w) in float32, with gradient."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> pictures (B, 3, H, W), about 0..1 and not clamped, with gradient."""


class SDXLBase:
    """Any pipeline of diffusers' `StableDiffusionXLPipeline` family, of any size. Freezes its networks,
    changes nothing else."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.unet, self.vae = pipe, pipe.unet, pipe.vae
        for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        scheduler = pipe.scheduler
        self.schedule = NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Text:
        """`size` (height, width) in pixels is what SDXL is told about the picture; by default its own."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        side = self.unet.config.sample_size * self.pipe.vae_scale_factor
        size = size or (side, side)
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=embeds.dtype, device=self.device)
        return Text(embeds, pooled, time_ids.expand(len(prompts), -1))

    def predict(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        dtype = self.unet.dtype
        added = {"text_embeds": text.pooled.to(dtype), "time_ids": text.time_ids}
        output = self.unet(
            x_t.to(dtype),
            t,
            encoder_hidden_states=text.embeds.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return output[0].float()

    def decode(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        latents = latents / config.scaling_factor
        if getattr(config, "latents_mean", None) is not None:
            mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (config.latents_mean, config.latents_std))
            latents = latents * std + mean
        picture = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return picture.float() / 2 + 0.5


@dataclass(frozen=True)
class Denoised:
    """One step of the diffusion branch: what was predicted, what was wanted, from where. All (B, c, h, w), t
    (B,)."""

    output: Tensor
    target: Tensor
    x_t: Tensor
    t: Tensor


def diffusion_branch(base: Base, draw: Draw, latents: Tensor, text: Any) -> Denoised:
    """Noise of a drawn strength over real pictures, and the base's prediction: the ground of L_diff (PuLID,
    section 3.1).

    Args:
        latents: (B, c, h, w), the pictures, on the base's device.
        text: what `base.encode_text` gave for their prompts.
    """
    noise = draw.randn(latents.shape, "noise").to(latents)
    t = base.schedule.times(draw.rand(latents.shape[:1], "time")).to(latents.device)
    x_t = base.schedule.noised(latents, noise, t)
    return Denoised(base.predict(x_t, t, text), base.schedule.target(latents, noise, t), x_t, t)
