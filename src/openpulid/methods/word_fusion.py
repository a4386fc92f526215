"""A change of the prompt in which the word for a person means an identity: ELITE, PhotoVerse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.prompt_fusion import Encode, Encoding, PromptFusion, repeat_class_word


class WordFusion(PromptFusion):
    """The first word for a person has the embeddings of an identity.

    Args:
        state: of the pipeline.
        words: per entry of people (n, W), n embeddings for both text encoders side by side.
        span: see `PromptFusion`.
    """

    def __init__(self, state: PipelineState, words: Sequence[Tensor], span: Span) -> None:
        super().__init__(state, len(words), span)
        self.encoders = (state.target.text_encoder, state.target.text_encoder_2)
        self.words = [entry.split(embedding_widths(state.target), -1) for entry in words]

    def change_prompts(
        self, index: int, tokenizer: Any, input_ids: Tensor, encode: Encode
    ) -> list[Mapping[int, Encoding]]:
        """Encode prompts whose word means an identity, see `PromptFusion.change_prompts`.

        All prompts are encoded together, each with one of its identities at a time. A prompt whose
        word is too late has no entry; a negative prompt needs none.
        """
        count = len(self.words[0][index])
        ids, positions = repeat_class_word(input_ids, tokenizer, count)
        # the last position is that of the end token
        has_room = [position + count < ids.shape[1] for position in positions]
        positions = [
            position if fits else 1 for position, fits in zip(positions, has_room, strict=True)
        ]
        entries = [self._entries(row, len(ids)) for row in range(len(ids))]
        changed: list[dict[int, Encoding]] = [{} for _ in entries]
        for turn in range(max(map(len, entries))):
            chosen = [numbers[min(turn, len(numbers) - 1)] for numbers in entries]
            vectors = torch.stack([self.words[entry][index] for entry in chosen])
            with insert_vectors(self.encoders[index], positions, vectors):
                encodings = encode(ids)
            for row, encoding in enumerate(encodings):
                if has_room[row]:
                    changed[row][chosen[row]] = replace(encoding, positions=(positions[row],))
        return list(changed)

    def _entries(self, row: int, num_prompts: int) -> range:
        """Return the entries that the images of a prompt can show."""
        first = row * self.num_entries // num_prompts
        return range(first, -(-(row + 1) * self.num_entries // num_prompts))


@contextmanager
def insert_vectors(encoder: nn.Module, positions: Sequence[int], vectors: Tensor) -> Iterator[None]:
    """Make a text encoder read vectors in the place of tokens while this is open.

    Args:
        encoder: the text encoder.
        positions: P, of the first token in each prompt.
        vectors: (P, n, D).
    """
    rows = torch.arange(len(vectors))[:, None]
    columns = torch.tensor(positions)[:, None] + torch.arange(vectors.shape[1])

    def insert(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[rows, columns] = vectors.to(output)
        return changed

    embeddings: nn.Module = encoder.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(insert)
    try:
        yield
    finally:
        handle.remove()


def embedding_widths(pipe: Any) -> list[int]:
    """Return the widths of the token embeddings of a pipeline's two text encoders."""
    return [
        encoder.get_input_embeddings().weight.shape[1]
        for encoder in (pipe.text_encoder, pipe.text_encoder_2)
    ]
