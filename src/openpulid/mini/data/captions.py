"""Sentences for the pictures of a data set, as tokens, made once and kept: drawing them anew would cost as much as training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from openpulid.training.rng import generator_for
from openpulid.world.dataset import WorldDataset

VARIANTS = 4
"""Sentences per picture: other synonyms, another order, other things left unsaid."""


class Captions:
    """tokens: (N, V, L) uint8, V sentences of L tokens for each of N pictures."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    @classmethod
    def of(
        cls,
        data: WorldDataset,
        tokenizer: PreTrainedTokenizerBase,
        cache: Path | None = None,
        variants: int = VARIANTS,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Captions:
        """Writes the sentences, or reads them from the file `cache` (.npy) when it holds as many as are wanted."""
        shape = (len(data), variants, tokenizer.model_max_length)
        if cache is not None and cache.exists():
            tokens = np.load(cache)
            if tokens.shape == shape:
                return cls(tokens)
        tokens = np.zeros(shape, dtype=np.uint8)
        for row in range(len(data)):
            scene, generator = data.scene(row), generator_for("captions", row)
            sentences = [scene.prompt(generator) for _ in range(variants)]
            tokens[row] = token_ids(tokenizer, sentences)
            if on_progress and row % 1000 == 0:
                on_progress(row, len(data))
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.save(cache, tokens)
        return cls(tokens)

    @classmethod
    def joined(cls, several: Sequence[Captions]) -> Captions:
        return cls(np.concatenate([some.tokens for some in several]))

    def rows(self, rows: Tensor, variants: Tensor) -> Tensor:
        """(B, L) int64 tokens: of picture rows[i] the sentence variants[i]."""
        return torch.from_numpy(self.tokens[rows.numpy(), variants.numpy()].astype(np.int64))


def token_ids(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> Tensor:
    """(B, L) int64 tokens, padded and cut to the tokenizer's length, as the pipeline makes them."""
    return tokenizer(
        sentences, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
