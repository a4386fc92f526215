"""The miniature's tokenizer, with the closed vocabulary of its world."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from openpulid.world import VOCABULARY

LENGTH = 48
"""Tokens of a prompt including begin and end; the longest prompt of the world has a few less."""
BEGIN = "<|startoftext|>"
END = "<|endoftext|>"
PAD = "<|pad|>"
UNKNOWN = "<|unknown|>"


def build_tokenizer(
    words: Sequence[str] = VOCABULARY, length: int = LENGTH
) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word or comma.

    A `CLIPTokenizer` would split unknown words into letters. This one maps them to an unknown
    token, so that a prompt can be rejected instead of misunderstood.

    Args:
        words: the vocabulary.
        length: maximum number of tokens of a prompt.
    """
    tokens = {token: index for index, token in enumerate([BEGIN, END, PAD, UNKNOWN, *words])}
    backend = Tokenizer(WordLevel(tokens, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, tokens[BEGIN]), (END, tokens[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
    )
