"""Textual Inversion (arXiv 2208.01618): a word whose embeddings were tuned on one person."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.io.checkpoint_kinds import EMBEDDING, CheckpointKind
from openpulid.io.checkpoints import read_optional_metadata, read_tensors
from openpulid.methods.hooks import PipelineState
from openpulid.methods.tuned.base import ActiveCall, TunedAdapter
from openpulid.methods.tuned.words import ENCODERS, Trigger, encoder_words, read_words


class TextualInversion(TunedAdapter):
    """Embeddings of one word, for both text encoders of SDXL.

    Args:
        vectors: "clip_l" and "clip_g" -> (n, D).
        trigger: the word.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (EMBEDDING,)

    def __init__(self, vectors: Mapping[str, Tensor], trigger: Trigger) -> None:
        super().__init__(trigger)
        self.vectors = dict(vectors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextualInversion:
        """Load a file of `pulid tune`.

        Raises:
            WeightsError: the file is missing, damaged, no embedding for SDXL, or names no word.
        """
        cls.check_file(path)
        tensors = read_tensors(path)
        if tensors.keys() != ENCODERS.keys():
            raise WeightsError(f"{path} is not an embedding for SDXL; use one that is.")
        trigger = Trigger.from_metadata(read_optional_metadata(path), replaces_noun=True)
        if trigger is None:
            raise WeightsError(
                f"{path} does not say which word it is; pass it with --embedding WORD=FILE instead."
            )
        return cls(tensors, trigger)

    def save(self, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> None:
        """Write the embeddings in the one-file format of SDXL, which ComfyUI opens."""
        assert self.trigger is not None
        self._write(path, "textual-inversion", self.vectors, torch.float32, metadata)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TextualInversion:
        """Move the embeddings to a device and dtype."""
        self.vectors = {name: x.to(device, dtype) for name, x in self.vectors.items()}
        return self

    def check(self, target: Any) -> None:
        """Raise an error if the embeddings do not fit a pipeline of SDXL.

        Raises:
            OptionError: the target is no pipeline of SDXL, or its tokenizer has no such word.
            WeightsError: the embeddings have another width.
        """
        super().check(target)
        assert self.trigger is not None
        encoder_words(target, self.trigger.word, self.vectors)

    def open_hooks(
        self, state: PipelineState, scale: float, call: ActiveCall, stack: ExitStack
    ) -> None:
        """Register the hooks of the text encoders.

        Raises:
            OptionError: a scale, start or end is set.
        """
        if scale != 1 or not call.span.covers_schedule:
            raise OptionError(
                "Textual Inversion has no scale, start or end: a word is in the prompt or is not."
            )
        assert self.trigger is not None
        words = encoder_words(state.target, self.trigger.word, self.vectors)
        stack.enter_context(read_words(words))
