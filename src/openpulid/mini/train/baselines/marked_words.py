"""FastComposer and PhotoMaker with prompts that name no person, as in their training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from openpulid.identity.identity import Identity
from openpulid.methods.fastcomposer.fastcomposer import FastComposer
from openpulid.methods.fastcomposer.fusion import MarkedWordFusion
from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.photomaker.fusion import RepeatedWordFusion
from openpulid.methods.photomaker.photomaker import PhotoMaker
from openpulid.methods.prompt_fusion import (
    Encode,
    Encoding,
    PromptFusion,
    mark_class_words,
    remove_trigger_word,
)


class DroppableFusion(PromptFusion):
    """A fusion in which a dropped identity, which is all zero, leaves its prompt as it is."""

    def __init__(
        self, state: PipelineState, encoder: Any, people: Sequence[Sequence[Identity]], span: Span
    ) -> None:
        super().__init__(state, encoder, people, span)  # type: ignore[arg-type, call-arg]
        self.is_dropped = [not identity.id_cond.any() for (identity,) in people]

    def change_prompts(
        self, index: int, tokenizer: Any, input_ids: Tensor, encode: Encode
    ) -> list[Mapping[int, Encoding]]:
        """Change the prompts of the other identities, see `PromptFusion.change_prompts`."""
        changed = super().change_prompts(index, tokenizer, input_ids, encode)
        if not any(self.is_dropped):
            return changed
        plain = encode(remove_trigger_word(input_ids, tokenizer))
        return [
            {
                entry: encoding if self.is_dropped[entry] else marked[entry]
                for entry in range(self.num_entries)
            }
            for encoding, marked in zip(plain, changed, strict=True)
        ]

    def fuse(self, states: Tensor, positions: Sequence[int], entry: int) -> Tensor:
        """Fuse the words of a prompt (L, D) with the person of an entry, if there is one."""
        return states if self.is_dropped[entry] else super().fuse(states, positions, entry)


class DroppableMarkedWordFusion(DroppableFusion, MarkedWordFusion):
    """FastComposer's fusion in training."""


class DroppableRepeatedWordFusion(DroppableFusion, RepeatedWordFusion):
    """PhotoMaker's fusion in training."""


class DroppableFastComposer(FastComposer):
    """FastComposer in training."""

    fusion: ClassVar[Any] = DroppableMarkedWordFusion


class DroppablePhotoMaker(PhotoMaker):
    """PhotoMaker in training."""

    fusion: ClassVar[Any] = DroppableRepeatedWordFusion


def find_words(prompts: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the position of the first word for a person in each prompt."""
    tokens = tokenizer(
        list(prompts), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return [first for first, *_ in mark_class_words(tokens, tokenizer)[1]]
