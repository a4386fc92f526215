"""FLUX.1 as training uses it.

Shapes: B batch, c x h x w latents, L = h / 2 * w / 2 image tokens of width 4 c, T text tokens of
width D, H x W images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from openpulid.diffusion.flow_schedule import FlowSchedule
from openpulid.training.pulid.attention_capture import AttentionCapture
from openpulid.training.pulid.models import AttentionQK

PATCH = 2
"""Side of an image token in latents."""


@dataclass(frozen=True)
class FluxText:
    """Text of a FLUX base.

    Attributes:
        embeds: (B, T, D) tokens of T5.
        pooled: (B, P) pooled embedding of CLIP.
    """

    embeds: Tensor
    pooled: Tensor


class FluxModel:
    """A `BaseModel` of diffusers' `FluxPipeline`, of any size.

    Freezes the pipeline's networks and changes nothing else.

    Args:
        pipe: the pipeline.
        pixels: width of the images; a scheduler that shifts by resolution shifts for this one.
        guidance: value of the guidance embedding; a model without one does not read it.
        max_sequence_length: T.
        logit_mean, logit_std: see `FlowSchedule`.
    """

    checkpoints_blocks = True

    def __init__(
        self,
        pipe: Any,
        pixels: int = 1024,
        guidance: float = 1.0,
        max_sequence_length: int = 512,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
    ) -> None:
        self.pipe = pipe
        self.transformer = pipe.transformer
        self.vae = pipe.vae
        self.pixels = pixels
        self.guidance = guidance
        self.max_sequence_length = max_sequence_length
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            module = getattr(pipe, name, None)  # FLUX.2 has one text encoder
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        self.schedule = FlowSchedule(self._shift(), logit_mean, logit_std)

    @property
    def device(self) -> torch.device:
        """The device of the transformer."""
        return self.transformer.device

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.transformer

    @property
    def blocks(self) -> list[nn.Module]:
        """The double and single blocks."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def _shift(self) -> float:
        """Return the scheduler's shift of the noise levels for the base's own size."""
        config = self.pipe.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        return math.exp(self._log_shift((self.latent_shape()[1] // PATCH) ** 2))

    def _log_shift(self, num_tokens: int) -> float:
        """Return the logarithm of the shift for this many image tokens, as the pipeline does."""
        config = self.pipe.scheduler.config
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        return float(config.base_shift + slope * (num_tokens - config.base_image_seq_len))

    def latent_shape(self, pixels: int | None = None) -> tuple[int, int, int]:
        """Return (c, h, w) of a square image's latents; by default of the base's own size."""
        side = PATCH * ((pixels or self.pixels) // (PATCH * self.pipe.vae_scale_factor))
        return self.transformer.config.in_channels // PATCH**2, side, side

    @torch.no_grad()
    def encode_text(
        self,
        prompts: Sequence[str],
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> Any:
        """Encode B prompts, without gradient; the size of the images is not read."""
        texts = ([""] * len(prompts) if guided else []) + list(prompts)
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=None,
            device=self.device,
            num_images_per_prompt=1,
            max_sequence_length=self.max_sequence_length,
        )
        return FluxText(embeds, pooled)

    def predict(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        """Run the transformer on (B, c, h, w) at noise levels (B,); float32, with gradient."""
        height, width = (side // PATCH for side in x_t.shape[-2:])
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(x_t),), self.guidance, device=x_t.device)
        return predict_velocity(
            self.transformer,
            x_t,
            t,
            img_ids=self._position_ids(height, width),
            guidance=guidance,
            **self._text_arguments(text),
        )

    def _text_arguments(self, text: FluxText) -> dict[str, Tensor]:
        """Return the arguments of the transformer that are of the text."""
        return text_arguments(text, self.transformer.dtype)

    def _position_ids(self, height: int, width: int) -> Tensor:
        """Return the positions of the image tokens."""
        return position_ids(height, width)

    @contextmanager
    def capture_attention(self) -> Iterator[list[AttentionQK]]:
        """Collect the image's queries and the text's keys of every block, in call order.

        The list is filled when the context is closed: a block that runs again in the backward pass
        must compute what it computed before. Queries and keys are rotated to their positions.
        """
        attention: list[AttentionQK] = []
        captures: list[AttentionCapture] = []
        # the text has keys of its own in a double block
        double = [(block.attn, "norm_added_k") for block in self.transformer.transformer_blocks]
        single = [(block.attn, "norm_k") for block in self.transformer.single_transformer_blocks]
        with ExitStack() as stack:
            for attn, key_norm in double + single:
                captures.append(AttentionCapture("image_rotary_emb", key_norm))
                captures[-1].register(attn, stack)
            yield attention
        for call in range(len(captures[0].calls)):
            # a single block has the text first; its length is that of a double block's keys
            _, _, text_keys = captures[0].calls[call]
            num_text = text_keys.shape[1]
            attention += [_rotate_pair(*capture.calls[call], num_text) for capture in captures]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to latents (B, c, h, w) in float32."""
        parameter = next(self.vae.parameters())
        latents = self.vae.encode((2 * images - 1).to(parameter)).latent_dist.mode().float()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, c, h, w) to images (B, 3, H, W), about 0..1 and not clamped, with gradient."""
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5


def _rotate_pair(
    rotation: tuple[Tensor, Tensor], query: Tensor, key: Tensor, num_text: int
) -> AttentionQK:
    """Select and rotate the image's queries and the text's keys of a block.

    Args:
        rotation: cosine and sine of all tokens, text first, (T + L, d).
        query: (B, L or T + L, heads, d).
        key: (B, T or T + L, heads, d).
        num_text: T.
    """
    cos, sin = rotation
    num_image = len(cos) - num_text
    query = apply_rotary_emb(
        query[:, -num_image:], (cos[num_text:], sin[num_text:]), sequence_dim=1
    )
    key = apply_rotary_emb(key[:, :num_text], (cos[:num_text], sin[:num_text]), sequence_dim=1)
    return AttentionQK(query.transpose(1, 2), key.transpose(1, 2))


def predict_velocity(
    transformer: Any, x_t: Tensor, t: Tensor, img_ids: Tensor, **arguments: Any
) -> Tensor:
    """Pack latents (B, c, h, w), call a transformer at noise levels (B,), and unpack its output.

    Args:
        transformer: of FLUX's kind.
        x_t: latents.
        t: noise levels in [0, 1].
        img_ids: positions of the image tokens.
        arguments: other arguments of the transformer.

    Returns:
        (B, c, h, w) in float32, with gradient.
    """
    dtype = transformer.dtype
    size = tuple(side // PATCH for side in x_t.shape[-2:])
    output = transformer(
        hidden_states=pixel_unshuffle(x_t, PATCH).flatten(2).transpose(1, 2).to(dtype),
        timestep=t.to(x_t.device, dtype),
        img_ids=img_ids.to(x_t.device),
        return_dict=False,
        **arguments,
    )[0]
    return pixel_shuffle(output.float().transpose(1, 2).unflatten(2, size), PATCH)


def text_arguments(text: FluxText, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arguments of FLUX.1's transformer that are of the text."""
    return {
        "encoder_hidden_states": text.embeds.to(dtype),
        "pooled_projections": text.pooled.to(dtype),
        "txt_ids": torch.zeros(text.embeds.shape[1], 3, device=text.embeds.device),
    }


def position_ids(height: int, width: int) -> Tensor:
    """Return the positions (L, 3) of image tokens: zero, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
