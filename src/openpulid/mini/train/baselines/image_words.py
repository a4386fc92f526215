"""PhotoVerse in training: words whose meaning comes from levels of the vision encoder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpulid.methods.level_mapper import NUM_LEVELS, last_first
from openpulid.methods.photoverse import PhotoVerse
from openpulid.methods.photoverse.encoders import PhotoVerseLayer, PhotoVerseNetworks
from openpulid.mini.train.baselines.base import Attention, Baseline
from openpulid.mini.train.baselines.tensors import RANK, save_half
from openpulid.training import StepRNG
from openpulid.training.photoverse import PhotoVerseLoss, draw_fusion, mean_size
from openpulid.training.pulid import Batch

HIDDEN_WIDTH = 128
"""Of the mapper networks; the authors have 1024."""


class PhotoVerseBaseline(Baseline):
    """PhotoVerse, with random fusion and the regularizers of words and visual values.

    As in the paper (arXiv 2309.05793, section 3.3), all five words are in the prompts of the
    training, and the identity is never dropped. **The paper's face loss is left out**: it needs a
    denoised image in each step, and no other baseline has one.
    """

    needs_identity = True
    trains_text = True
    method: PhotoVerse

    def use(
        self, batch: Batch, pipe: Any, rng: StepRNG | None = None
    ) -> AbstractContextManager[Any]:
        """Open the method; a training step has all words and draws the weights of the parts."""
        return self.method.use(
            self.identities(batch),
            num_words=NUM_LEVELS if rng else 1,
            fusion=draw_fusion(rng.generator("fusion")) if rng else None,
            pipe=pipe,
        )

    def extra_losses(self, batch: Batch, pipe: Any, attention: Attention) -> Mapping[str, Tensor]:
        """Compute the terms that keep words and visual values small, with the paper's weights."""
        networks = self.method.networks
        levels = last_first(batch.hidden)
        tokens = networks.image_adapter.words(levels)
        sizes = []
        for layer in networks.cross_attention.values():
            assert isinstance(layer, PhotoVerseLayer)
            sizes.append(mean_size(layer.to_v_visual(tokens)))
        weights = PhotoVerseLoss()
        return {
            "words": weights.words * mean_size(networks.text_adapter.words(levels)),
            "values": weights.values * torch.stack(sizes).mean(),
        }

    def save(self, path: Path, pipe: Any) -> Path:
        """Save all networks."""
        return save_half(self.method.networks.state_dict(), path)


def photoverse(pipe: Any, width: int) -> Baseline:
    """Create PhotoVerse, which changes nothing in the attention yet.

    Args:
        pipe: the miniature's pipeline.
        width: of the levels of the vision encoder.
    """
    networks = PhotoVerseNetworks.for_pipeline(pipe, width, HIDDEN_WIDTH, RANK)
    return PhotoVerseBaseline(PhotoVerse(networks), networks)
