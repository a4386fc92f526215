"""Checks of a prompt against the tokenizer of a pipeline."""

from __future__ import annotations

import difflib
import re
from typing import Any

from openpulid.errors import PromptError
from openpulid.pipelines.request import GenerationRequest


def check_prompts(pipe: Any, request: GenerationRequest, negative_prompt: str | None) -> None:
    """Refuse what the text encoders would silently drop.

    Args:
        pipe: a StableDiffusionXLPipeline or FluxPipeline.
        request: a resolved request.
        negative_prompt: the user's negative prompt. A preset's own is not checked: it may be
            longer than what the model reads, and is cut.

    Raises:
        PromptError: the model does not know a word, or the prompt is too long.
    """
    if request.max_sequence_length is not None:  # FLUX: T5 reads the longer prompt
        tokenizer = pipe.tokenizer_2
        limit = request.max_sequence_length
    else:
        tokenizer = pipe.tokenizer
        limit = tokenizer.model_max_length
    for prompt in (request.prompt, negative_prompt or ""):
        check_prompt(tokenizer, limit, prompt)


def check_prompt(tokenizer: Any, limit: int, prompt: str) -> None:
    """Refuse unknown words, and a prompt with more tokens than a limit.

    Raises:
        PromptError: names the words with similar ones, or the number of tokens.
    """
    words = dict.fromkeys(re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", prompt))
    unknown = [word for word in words if _is_unknown(tokenizer, word)]
    if unknown:
        vocabulary = [token.removesuffix("</w>") for token in tokenizer.get_vocab()]
        vocabulary = [token for token in vocabulary if re.match(r"\w", token)]
        described = " and ".join(_describe(word, vocabulary) for word in unknown)
        raise PromptError(
            f"the model does not know {described}; use words of its vocabulary.", unknown
        )
    length = len(tokenizer(prompt, truncation=False).input_ids)
    if length > limit:
        raise PromptError(
            f"the prompt has {length} tokens, and the model reads {limit}; shorten it."
        )


def _is_unknown(tokenizer: Any, word: str) -> bool:
    return tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids


def _describe(word: str, vocabulary: list[str]) -> str:
    """Quote an unknown word, with similar ones of the vocabulary."""
    similar = difflib.get_close_matches(word.lower(), vocabulary, 2, 0.6)
    return repr(word) + (f" (similar: {', '.join(similar)})" if similar else "")
