"""ELITE in training: a word that means an image, and local attention to the image's patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpulid.methods.elite.attention import find_layers
from openpulid.methods.elite.elite import ELITE
from openpulid.methods.elite.encoders import Mapper, Mappers
from openpulid.methods.level_mapper import NUM_LEVELS, last_first
from openpulid.methods.word_fusion import embedding_widths
from openpulid.mini.train.baselines.base import (
    Attention,
    Baseline,
    draw_uniform,
)
from openpulid.mini.train.baselines.tensors import save_half
from openpulid.training import StepRNG
from openpulid.training.photoverse import mean_size
from openpulid.training.pulid import Batch

INNER_WIDTH = 128
"""Of the mapper networks; the authors have 1024."""
WORDS_WEIGHT = 0.01
VALUES_WEIGHT = 1e-4


class ELITEBaseline(Baseline):
    """ELITE, with the regularizers of words and local values (arXiv 2302.13848).

    **Both mappers train together in one run.** The authors train the global mapper first, with all
    five words in the prompt, and then the local one on it, with the first word alone. Here half of
    the steps are of the first kind and half of the second, and gradients reach what takes part. As
    the authors do, it never drops the identity and gives the local attention the weight 1. The
    features are of the face on white, so there are no masks.
    """

    needs_identity = True
    trains_text = True
    method: ELITE

    @contextmanager
    def use(self, batch: Batch, pipe: Any, rng: StepRNG | None = None) -> Iterator[Any]:
        """Open the method; a training step draws which training of the authors it belongs to."""
        is_global = rng is not None and draw_uniform(rng, "words") < 0.5
        mappers = self.method.encoder
        mappers.num_words = NUM_LEVELS if is_global else 1
        try:
            with self.method.use(
                self.identities(batch), local_scale=0.0 if is_global else 1.0, pipe=pipe
            ) as method:
                yield method
        finally:
            mappers.num_words = 1

    def extra_losses(self, batch: Batch, pipe: Any, attention: Attention) -> Mapping[str, Tensor]:
        """Compute the terms that keep words and local values small, with the authors' weights."""
        mappers = self.method.encoder
        local = mappers.local_mapper
        assert local is not None
        levels = last_first(batch.hidden)
        patches = local.patches(levels)
        sizes = [mean_size(local.matrix(layer, "v")(patches)) for layer in local.layers]
        return {
            "words": WORDS_WEIGHT * mean_size(mappers.global_mapper.words(levels)),
            "values": VALUES_WEIGHT * torch.stack(sizes).mean(),
        }

    def save(self, path: Path, pipe: Any) -> Path:
        """Save both mappers in 8 bits."""
        return save_half(self.method.encoder.state_dict(), path, in_8_bits=True)


def elite(pipe: Any, width: int) -> Baseline:
    """Create ELITE, whose keys and values start as copies of the U-Net's, as the authors do.

    Args:
        pipe: the miniature's pipeline.
        width: of the levels of the vision encoder.
    """
    layers = find_layers(pipe.unet)
    mappers = Mappers(_create_mapper(pipe, layers, width), _create_mapper(pipe, layers, width))
    return ELITEBaseline(ELITE(mappers), mappers)


def _create_mapper(pipe: Any, layers: Mapping[str, Any], width: int) -> Mapper:
    sizes = {name: layer.to_k.out_features for name, layer in layers.items()}
    mapper = Mapper(width, INNER_WIDTH, sum(embedding_widths(pipe)), sizes)
    for name, layer in layers.items():
        for kind in "kv":
            source = getattr(layer, f"to_{kind}").weight
            mapper.matrix(name, kind).weight.data.copy_(source)
    return mapper
