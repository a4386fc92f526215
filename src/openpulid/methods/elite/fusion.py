"""ELITE's change of the prompt: the word for a person gets embeddings of the person's image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.elite.encoders import Mappers
from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.prompt_fusion import Encode, Encoding, PromptFusion, mark_class_words
from openpulid.methods.tuned.words import EncoderWord, read_words


class WordFusion(PromptFusion):
    """ELITE on one pipeline: the first word for a person means the identity.

    Args:
        state: of the pipeline.
        mappers: of the adapter.
        people: the identity of each prompt, or one for all prompts.
        span: see `PromptFusion`.
    """

    method: ClassVar[str] = "ELITE"

    def __init__(
        self,
        state: PipelineState,
        mappers: Mappers,
        people: Sequence[Sequence[Identity]],
        span: Span,
    ) -> None:
        super().__init__(state, len(people), span)
        self.people = [identity for (identity,) in people]
        if len({identity.photos for identity in self.people}) > 1:
            raise OptionError(
                "identities used together must have the same number of reference images."
            )
        self.encoders = (state.target.text_encoder, state.target.text_encoder_2)
        self.words = [
            mappers.encode_words(identity).split(embedding_widths(state.target), -1)
            for identity in self.people
        ]

    def change_prompts(
        self, index: int, tokenizer: Any, input_ids: Tensor, encode: Encode
    ) -> list[Mapping[int, Encoding]]:
        """Encode prompts whose word means an identity, see `PromptFusion.change_prompts`."""
        ids, places = mark_class_words(input_ids, tokenizer)
        end = tokenizer.eos_token_id
        changed: list[Mapping[int, Encoding]] = []
        for row, (position, *_) in enumerate(places):
            token = int(ids[row, position])
            encodings = {}
            for entry in self._entries(row, len(ids)):
                word = EncoderWord(self.encoders[index], token, end, self.words[entry][index])
                with read_words([word]):
                    (encoding,) = encode(ids[row : row + 1])
                # every word of this token is changed
                encodings[entry] = replace(encoding, positions=(ids[row].tolist().index(token),))
            changed.append(encodings)
        return changed

    def _entries(self, row: int, num_prompts: int) -> range:
        """Return the entries that the images of a prompt can show."""
        first = row * self.num_entries // num_prompts
        return range(first, -(-(row + 1) * self.num_entries // num_prompts))


def embedding_widths(pipe: Any) -> list[int]:
    """Return the widths of the token embeddings of a pipeline's two text encoders."""
    return [
        encoder.get_input_embeddings().weight.shape[1]
        for encoder in (pipe.text_encoder, pipe.text_encoder_2)
    ]
