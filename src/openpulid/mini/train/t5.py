"""Training of the miniature's T5: it learns to represent prompts as CLIP's text encoders do.

FLUX.1 reads a T5 that was trained on text before and stays frozen. Trained together with the
transformer instead, it learns which words occur together in the captions: colors of clothes that
occur with no background of the prompt came out wrong (benchmarks/mini-build.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from openpulid.mini.data import Captions
from openpulid.mini.models import TextEncoders, shorten
from openpulid.training import StepRNG
from openpulid.world import ATTRIBUTES

COLOR_NAMES = ("background", "clothing", "hat_color", "hair_color")
"""Attributes of the world that are colors."""
RECOLORED_SHARE = 0.5
"""Share of the captions whose colors are random."""
HELD_OUT_CAPTIONS = 1024
BATCH = 128
"""Captions at a time in the validation."""


class T5Task:
    """Trains T5 to predict the states of CLIP's text encoders; a `training.trainer.Task`.

    A linear head, used only in training, maps T5's states to those that SDXL's U-Net reads. Half of
    the captions get random colors, so that every pair of colors occurs. No image is involved.

    Args:
        t5: the encoder, which trains.
        text_encoders: CLIP's, frozen.
        tokenizer: of both.
        captions: training captions.
        held_out: captions of held-out people and scenes; None disables validation.
        batch: captions per step.
    """

    def __init__(
        self,
        t5: T5EncoderModel,
        text_encoders: TextEncoders,
        tokenizer: PreTrainedTokenizerBase,
        captions: Captions,
        held_out: Captions | None = None,
        batch: int = BATCH,
    ) -> None:
        self.t5 = t5
        self.text_encoders = text_encoders
        self.captions = captions
        self.held_out = held_out
        self.batch = batch
        self.head = nn.Linear(t5.config.d_model, text_encoders.width)
        names = sorted({color for name in COLOR_NAMES for color in ATTRIBUTES[name]})
        self.colors = torch.tensor(tokenizer.convert_tokens_to_ids(names))

    def modules(self) -> Mapping[str, nn.Module]:
        """Return T5 and its head."""
        return {"t5": self.t5, "head": self.head}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the mean squared error of random captions."""
        rows = rng.indices(len(self.captions.tokens), self.batch)
        variants = rng.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        tokens = self.recolor(self.captions.rows(rows, variants), rng)
        return {"states": self._error(tokens)}

    def recolor(self, tokens: Tensor, rng: StepRNG) -> Tensor:
        """Replace the colors of half of the captions (B, L) with random ones."""
        drawn = self.colors[rng.randint(len(self.colors), tokens.shape, "colors")]
        is_recolored = rng.rand(tokens.shape[:1], "recolored") < RECOLORED_SHARE
        is_color = torch.isin(tokens, self.colors) & is_recolored[:, None]
        return torch.where(is_color, drawn, tokens)

    def _error(self, tokens: Tensor) -> Tensor:
        """Compute the error against states that have mean 0 and variance 1 at every position."""
        tokens = tokens.to(self.t5.device)
        sizes = [
            encoder.config.hidden_size
            for encoder in (self.text_encoders.first, self.text_encoders.second)
        ]
        short = shorten(tokens, self.t5)
        parts = self.text_encoders(tokens).embeds[:, : short.shape[1]].split(sizes, -1)
        states = torch.cat([layer_norm(part, part.shape[-1:]) for part in parts], -1)
        return (self.head(self.t5(short)[0]).float() - states).square().mean()

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Measure the mean squared error on held-out captions.

        Returns:
            `error`, a share of the variance of CLIP's states.
        """
        if self.held_out is None:
            return {}
        tokens = torch.from_numpy(self.held_out.tokens[:HELD_OUT_CAPTIONS, 0].astype(np.int64))
        errors = [self._error(part) for part in tokens.split(BATCH)]
        return {"error": torch.stack(errors).mean().item()}

    def sheet(self) -> Image.Image | None:
        """Draw nothing: text has no images."""
        return None
