"""A word of the prompt that means vectors of a file instead of the text encoder's own embedding.

Two hooks per text encoder: one repeats the token of the word, once per vector, the other returns
the vectors for these tokens. Tokenizer and encoder stay as they are, so closing the hooks gives bit
for bit the old text. The token is one that the encoder knows already. With a new token, whose id is
above that of the end token, encoders whose configuration has the old `eos_token_id` 2 would read
the pooled embedding at the word instead of at the end of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.adapter import check_text_encoders
from openpulid.methods.hooks import HookResult

ENCODERS = {"clip_l": "", "clip_g": "_2"}
"""Tensor of a file -> suffix of the names of SDXL's text encoder and tokenizer."""


@dataclass(frozen=True)
class Trigger:
    """The word for the person, and what the person is.

    Attributes:
        word: a word that the base model hardly knows, such as "sks".
        class_word: what the person is, such as "woman".
        replaces_noun: whether the word stands in the place of the class word, as in Textual
            Inversion, instead of before it.
    """

    word: str
    class_word: str = "person"
    replaces_noun: bool = False

    @property
    def phrase(self) -> str:
        """How captions call the person."""
        return self.word if self.replaces_noun else f"{self.word} {self.class_word}"

    def insert(self, prompt: str) -> str:
        """Return a prompt that names the person.

        A prompt with the word stays as it is. Otherwise the first class word becomes the phrase; a
        prompt without one starts with the phrase.
        """
        if _find(self.word, prompt):
            return prompt
        match = _find(self.class_word, prompt)
        if match is None:
            return f"{self.phrase}, {prompt}" if prompt.strip() else self.phrase
        return prompt[: match.start()] + self.phrase + prompt[match.end() :]

    def metadata(self) -> dict[str, str]:
        """Return the entries of a file's metadata."""
        return {"trigger": self.word, "class_word": self.class_word}

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, str], replaces_noun: bool = False
    ) -> Trigger | None:
        """Read the entries of a file's metadata; None if the file names no word."""
        word = metadata.get("trigger", "").strip()
        class_word = metadata.get("class_word", "").strip()
        return cls(word, class_word or "person", replaces_noun) if word else None


@dataclass(frozen=True, eq=False)
class EncoderWord:
    """What one text encoder reads for a word.

    Attributes:
        encoder: the text encoder.
        token: id of the word's token.
        end: id of the end token.
        vectors: (n, D) embeddings, which may require gradients.
    """

    encoder: nn.Module
    token: int
    end: int
    vectors: Tensor


def find_token(tokenizer: Any, word: str) -> int:
    """Return the id of the token of a word.

    Raises:
        OptionError: the word has several tokens, or the tokenizer does not know it.
    """
    ids: list[int] = tokenizer(word, add_special_tokens=False).input_ids
    # what a tokenizer does not know becomes one of its special tokens
    is_unknown = word not in tokenizer.all_special_tokens and any(
        token in tokenizer.all_special_ids for token in ids
    )
    if len(ids) != 1 or is_unknown:
        raise OptionError(
            f"{word!r} is not one token of the model's vocabulary; choose a short word of it."
        )
    return ids[0]


@contextmanager
def read_words(words: Sequence[EncoderWord]) -> Iterator[None]:
    """Make text encoders read the vectors of words while this is open.

    Args:
        words: any number per encoder, with different tokens.
    """
    with ExitStack() as stack:
        for word in words:
            hooks = _WordHooks(word)
            embeddings: nn.Module = word.encoder.get_input_embeddings()  # type: ignore[operator]
            for handle in (
                word.encoder.register_forward_pre_hook(hooks.repeat, with_kwargs=True),
                embeddings.register_forward_hook(hooks.look_up),
            ):
                stack.callback(handle.remove)
        yield


class _WordHooks:
    """The two hooks of one word in one text encoder."""

    def __init__(self, word: EncoderWord) -> None:
        self.word = word

    def repeat(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HookResult | None:
        """Repeat the token once per vector (forward pre-hook of the text encoder)."""
        word = self.word
        input_ids = args[0] if args else kwargs["input_ids"]
        if len(word.vectors) == 1 or not (input_ids == word.token).any():
            return None
        repeated = repeat_token(input_ids, word.token, len(word.vectors), word.end)
        if args:
            return (repeated, *args[1:]), kwargs
        return args, {**kwargs, "input_ids": repeated}

    def look_up(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Return the vectors at the places of the token (forward hook of the embeddings)."""
        places = args[0] == self.word.token  # (B, L)
        if not places.any():
            return None
        vectors = self.word.vectors.to(output)
        index = (places.cumsum(-1) - 1) % len(vectors)
        return torch.where(places[..., None], vectors[index], output)


def repeat_token(input_ids: Tensor, token: int, count: int, end: int) -> Tensor:
    """Repeat a token; later tokens move right, and what does not fit is cut before the end token.

    Args:
        input_ids: (B, L).
        token: the token to repeat.
        count: how often it occurs afterwards.
        end: the end token, where the pooled embedding is read.

    Returns:
        (B, L).
    """
    rows = []
    for row in input_ids.tolist():
        repeated = [x for x in row for _ in range(count if x == token else 1)][: len(row)]
        if end not in repeated:
            repeated[-1] = end
        rows.append(repeated)
    return torch.tensor(rows, device=input_ids.device)


def encoder_words(pipe: Any, word: str, vectors: Mapping[str, Tensor]) -> list[EncoderWord]:
    """Return what both text encoders of a pipeline read for a word.

    Args:
        pipe: a pipeline of SDXL.
        word: one token of its tokenizers.
        vectors: "clip_l" and "clip_g" -> (n, D).

    Raises:
        OptionError: the pipeline is not one of SDXL, or has no such word.
        WeightsError: the vectors have another width.
    """
    check_text_encoders(pipe)
    words = []
    for name, suffix in ENCODERS.items():
        encoder = getattr(pipe, f"text_encoder{suffix}")
        tokenizer = getattr(pipe, f"tokenizer{suffix}")
        width = encoder.get_input_embeddings().weight.shape[1]
        if vectors[name].ndim != 2 or vectors[name].shape[1] != width:
            raise WeightsError(
                f"these embeddings do not fit the base model, whose {name} has width {width}; use "
                "the base model on which they were tuned."
            )
        token = find_token(tokenizer, word)
        words.append(EncoderWord(encoder, token, tokenizer.eos_token_id, vectors[name]))
    return words


def _find(word: str, prompt: str) -> re.Match[str] | None:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
