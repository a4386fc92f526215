"""Qwen-Image as training uses it.

Shapes: as in `flux_model`. The autoencoder is one for video, of which an image is the first frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from openpulid.training.pulid.attention_capture import AttentionCapture, rotate
from openpulid.training.pulid.flux_model import PATCH, FluxModel
from openpulid.training.pulid.models import AttentionQK


@dataclass(frozen=True)
class QwenImageText:
    """Text of a Qwen-Image base.

    Attributes:
        embeds: (B, T, D) hidden states of Qwen2.5-VL, padded with zeros.
        mask: (B, T), 1 for text and 0 for padding; None without padding.
    """

    embeds: Tensor
    mask: Tensor | None


class QwenImageModel(FluxModel):
    """A `BaseModel` of diffusers' `QwenImagePipeline`, of any size; with `FluxModel`'s arguments.

    Freezes the pipeline's networks and changes nothing else. The pipeline of the published base
    ends its runs at another noise level than a rollout, so it is for the diffusion branch alone.
    """

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.transformer.transformer_blocks)

    @torch.no_grad()
    def encode_text(
        self,
        prompts: Sequence[str],
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> QwenImageText:
        """Encode B prompts, without gradient; the size of the images is not read."""
        embeds, mask = self.pipe.encode_prompt(
            prompt=([""] * len(prompts) if guided else []) + list(prompts),
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return QwenImageText(embeds, mask)

    def predict(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        """Run the transformer on (B, c, h, w) at noise levels (B,); float32, with gradient."""
        dtype = self.transformer.dtype
        rows, columns = (side // PATCH for side in x_t.shape[-2:])
        output = self.transformer(
            hidden_states=pixel_unshuffle(x_t, PATCH).flatten(2).transpose(1, 2).to(dtype),
            timestep=t.to(x_t.device, dtype),
            encoder_hidden_states=text.embeds.to(dtype),
            encoder_hidden_states_mask=text.mask,
            img_shapes=[[(1, rows, columns)]] * len(x_t),
            return_dict=False,
        )[0]
        squares = output.float().transpose(1, 2).unflatten(2, (rows, columns))
        return pixel_shuffle(squares, PATCH)

    @contextmanager
    def capture_attention(self) -> Iterator[list[AttentionQK]]:
        """Collect the image's queries and the text's keys of every block, in call order.

        As in `FluxModel`. The keys include those of padding.
        """
        attention: list[AttentionQK] = []
        captures = [AttentionCapture("image_rotary_emb", "norm_added_k") for _ in self.blocks]
        with ExitStack() as stack:
            for capture, block in zip(captures, self.blocks, strict=True):
                capture.register(block.attn, stack)
            yield attention
        for call in range(len(captures[0].calls)):
            attention += [_rotate_pair(*capture.calls[call]) for capture in captures]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to latents (B, c, h, w) in float32."""
        parameter = next(self.vae.parameters())
        frames = (2 * images - 1).to(parameter).unsqueeze(2)
        latents = self.vae.encode(frames).latent_dist.mode().squeeze(2).float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, c, h, w) to images (B, 3, H, W) in [0, 1], with gradient."""
        mean, std = self._statistics(latents)
        frames = (latents * std + mean).to(self.vae.dtype).unsqueeze(2)
        images = self.vae.decode(frames, return_dict=False)[0].squeeze(2)
        return images.float() / 2 + 0.5

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of latents, (c, 1, 1) each."""
        config = self.vae.config
        mean, std = (latents.new_tensor(x) for x in (config.latents_mean, config.latents_std))
        return mean[:, None, None], std[:, None, None]


def _rotate_pair(rotation: tuple[Tensor, Tensor], query: Tensor, key: Tensor) -> AttentionQK:
    """Rotate the image's queries and the text's keys of a block.

    Args:
        rotation: of the image and of the text, (L, d / 2) and (T, d / 2), complex.
        query: (B, L, heads, d).
        key: (B, T, heads, d).
    """
    image, text = rotation
    query = rotate(query, image[None])
    return AttentionQK(query.transpose(1, 2), rotate(key, text[None]).transpose(1, 2))
