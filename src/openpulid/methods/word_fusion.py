"""A change of the prompt in which the word for a person means an identity: ELITE, PhotoVerse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from openpulid.errors import OptionError
from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.prompt_fusion import Encode, Encoding, PromptFusion, mark_class_words
from openpulid.methods.tuned.words import EncoderWord, read_words


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

        Raises:
            OptionError: the word is too late in the prompt.
        """
        ids, places = mark_class_words(input_ids, tokenizer)
        end = tokenizer.eos_token_id
        changed: list[Mapping[int, Encoding]] = []
        for row, (position, *_) in enumerate(places):
            token = int(ids[row, position])
            # every word of this token is changed
            first = ids[row].tolist().index(token)
            encodings = {}
            for entry in self._entries(row, len(ids)):
                word = EncoderWord(self.encoders[index], token, end, self.words[entry][index])
                if first + len(word.vectors) >= ids.shape[1]:  # the last one is the end token
                    raise OptionError(
                        f"the words of {self.method} do not fit, because the word for the person "
                        "is too late in the prompt; move it forward."
                    )
                with read_words([word]):
                    (encoding,) = encode(ids[row : row + 1])
                encodings[entry] = replace(encoding, positions=(first,))
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
