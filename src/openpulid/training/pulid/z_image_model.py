"""Z-Image as training uses it.

Shapes: as in `flux_model`. A sequence has the tokens of the image, then those of the text, each
padded to a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.training.pulid.attention_capture import AttentionCapture, rotate
from openpulid.training.pulid.flux_model import PATCH, FluxModel
from openpulid.training.pulid.models import AttentionQK

MULTIPLE = 32
"""Tokens of the image, and those of the text, are padded to a multiple of this number."""


@dataclass(frozen=True)
class ZImageText:
    """Text of a Z-Image base.

    Attributes:
        embeds: (T, D) of each prompt, hidden states of Qwen3; T differs.
    """

    embeds: Sequence[Tensor]


class ZImageModel(FluxModel):
    """A `BaseModel` of diffusers' `ZImagePipeline`, of any size; the arguments are `FluxModel`'s.

    Freezes the pipeline's networks and changes nothing else.
    """

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the image alone, of the text alone, and of both."""
        transformer = self.transformer
        return [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]

    def latent_shape(self, pixels: int | None = None) -> tuple[int, int, int]:
        """Return (c, h, w) of a square image's latents; by default of the base's own size."""
        side = PATCH * ((pixels or self.pixels) // (PATCH * self.pipe.vae_scale_factor))
        return self.transformer.in_channels, side, side

    @torch.no_grad()
    def encode_text(
        self,
        prompts: Sequence[str],
        *,
        pixels: int | tuple[int, int] | None = None,
        guided: bool = False,
    ) -> ZImageText:
        """Encode B prompts, without gradient; the size of the images is not read."""
        embeds, _ = self.pipe.encode_prompt(
            prompt=([""] * len(prompts) if guided else []) + list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return ZImageText(embeds)

    def predict(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        """Run the transformer on (B, c, h, w) at noise levels (B,); float32, with gradient.

        Its time rises from 0 to 1, and so it predicts the opposite direction.
        """
        dtype = self.transformer.dtype
        frames = x_t.to(dtype).unsqueeze(2)  # an image is a video of one frame
        output = self.transformer(
            list(frames.unbind()),
            1 - t.to(x_t.device),
            [embeds.to(dtype) for embeds in text.embeds],
            return_dict=False,
        )[0]
        return -torch.stack(list(output)).squeeze(2).float()

    @contextmanager
    def capture_attention(self) -> Iterator[list[AttentionQK]]:
        """Collect the image's queries and the text's keys of the blocks of both, in call order.

        As in `FluxModel`. Of texts of different lengths, the keys have the tokens of the shortest.
        """
        attention: list[AttentionQK] = []
        lengths: list[tuple[int, int]] = []
        captures = [AttentionCapture("freqs_cis", "norm_k") for _ in self.transformer.layers]

        def store_lengths(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            frames, _, texts = args
            height, width = frames[0].shape[-2:]
            num_image = (height // PATCH) * (width // PATCH)
            lengths.append((num_image, min(len(text) for text in texts)))

        with ExitStack() as stack:
            hook = self.transformer.register_forward_pre_hook(store_lengths, with_kwargs=True)
            stack.callback(hook.remove)
            for capture, layer in zip(captures, self.transformer.layers, strict=True):
                capture.register(layer.attention, stack)
            yield attention
        for call, (num_image, num_text) in enumerate(lengths):
            attention += [
                _rotate_pair(*capture.calls[call], num_image, num_text) for capture in captures
            ]


def _rotate_pair(
    rotation: Tensor, query: Tensor, key: Tensor, num_image: int, num_text: int
) -> AttentionQK:
    """Select and rotate the image's queries and the text's keys of a block.

    Args:
        rotation: of all tokens, (B, S, d / 2), complex.
        query: of all tokens, (B, S, heads, d).
        key: as the queries.
        num_image: tokens of the image without padding.
        num_text: tokens of the text without padding.
    """
    first = -(-num_image // MULTIPLE) * MULTIPLE  # the text begins after the padding
    text = slice(first, first + num_text)
    query = rotate(query[:, :num_image], rotation[:, :num_image])
    key = rotate(key[:, text], rotation[:, text])
    return AttentionQK(query.transpose(1, 2), key.transpose(1, 2))
