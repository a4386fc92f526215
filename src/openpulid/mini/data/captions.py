"""Captions of a dataset as tokens, cached: generating them costs as much as training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from openpulid.mini.data.cache import ArrayCache
from openpulid.mini.data.pairs import PairDataset
from openpulid.training import generator_for
from openpulid.world import WorldDataset

VARIANTS = 4
"""Captions per image, with different synonyms, order and omissions."""
BATCH = 1000
"""Images whose captions are written at once."""


class Captions:
    """Tokens of several captions per image.

    Attributes:
        tokens: (N, V, L) uint8, V captions of L tokens for each of N images.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    @classmethod
    def build(
        cls,
        data: WorldDataset | PairDataset,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        variants: int = VARIANTS,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Captions:
        """Generate the captions of a dataset, or load them if they are cached.

        Args:
            data: the dataset.
            tokenizer: the tokenizer of the text encoders.
            folder: folder of the cache.
            variants: captions per image.
            on_progress: called with the number of images done and their total.
        """
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
        key = {
            **data.key,
            "tokenizer": hashlib.sha256(vocabulary).hexdigest(),
            "length": tokenizer.model_max_length,
            "variants": variants,
        }

        def write_captions(rows: np.ndarray) -> dict[str, np.ndarray]:
            tokens = [_caption_tokens(data, row, tokenizer, variants) for row in rows.tolist()]
            return {"tokens": np.stack(tokens).astype(np.uint8)}

        cache = ArrayCache(folder, key, len(data))
        cache.fill(write_captions, BATCH, on_progress)
        return cls(cache.load("tokens"))

    @classmethod
    def concatenate(cls, parts: Sequence[Captions]) -> Captions:
        """Join the captions of several datasets."""
        return cls(np.concatenate([part.tokens for part in parts]))

    def rows(self, rows: Tensor, variants: Tensor) -> Tensor:
        """Return (B, L) int64 tokens: caption variants[i] of image rows[i]."""
        return torch.from_numpy(self.tokens[rows.numpy(), variants.numpy()].astype(np.int64))


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Tensor:
    """Tokenize prompts as the pipeline does: (B, L) int64, padded or cut to L tokens."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _caption_tokens(
    data: WorldDataset | PairDataset, row: int, tokenizer: PreTrainedTokenizerBase, variants: int
) -> np.ndarray:
    """Generate the captions of one image, (V, L)."""
    scene = data.scene(row)
    generator = generator_for("captions", row)
    captions = [scene.prompt(generator) for _ in range(variants)]
    return token_ids(tokenizer, captions).numpy()
