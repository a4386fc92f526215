"""What the text encoders read of a prompt: unknown words and signs, other syntax, length."""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from openpulid.errors import PromptError, WeightsError
from openpulid.methods.prompt_fusion import MORE_WORDS, count_class_words
from openpulid.pipelines.model_set import PROMPT_METHODS
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.prompt_weights import (
    Fragment,
    join_fragments,
    parse_weights,
    remove_marks,
)
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import RequestError
from openpulid.pipelines.weights import resolve_path

logger = logging.getLogger(__name__)

MIDJOURNEY = (
    "ar|aspect|chaos|cref|cw|exp|iw|niji|no|oref|profile|q|quality|raw|repeat|s|seed|sref|stop|"
    "style|stylize|sw|tile|v|version|video|weird"
)
"""Parameters that Midjourney reads after two dashes, which editors turn into a long dash."""

NUMBER = r"[-+]?\d*\.?\d+"
OTHER_SYNTAX = re.compile(
    "|".join(
        (
            r"<[^<>\s][^<>]*>",  # <lora:detail:0.8>
            r"\bembedding:\s*[^\s,]+",  # ComfyUI
            r"\\[nrt](?![a-z])|\\\W",  # typed line breaks, escaped brackets
            r"\({2,}[^()]*\){2,}",  # ((smile))
            rf"\([^()]*:\s*{NUMBER}\s*\)",  # (smile:1.3)
            rf"\([^()]*\)(?:[-+]+(?![\w-])|{NUMBER})",  # Compel: (smile)++, (smile)1.3
            r"\)\.(?:and|blend|swap)\([^()]*\)",  # Compel: ("smile", "laugh").blend(1, 1)
            r"\w+(?:\+\+|--)[-+]*(?!\w)",  # Compel: smile++
            r"\[+[^\[\]]*\]+",  # [smile], [smile:laugh:0.5]
            r"\{+[^{}]*\}+",  # {smile|laugh}
            r"(?<!\w)__[\w*/-]+__(?!\w)",  # wildcards
            rf"\w+\s*::\s*(?:{NUMBER})?",  # Midjourney: hat::2
            rf"(?<!\S)(?:--[a-z]\w*|[\u2013\u2014](?:{MIDJOURNEY})\b)(?:\s+[^\s,-][^\s,]*)?",
            rf"\b[A-Za-z][\w'-]*:{NUMBER}(?![\d:])",  # smile:1.2
            r"[\[\]{}|]",
            # pasted parameters of an image
            r"(?i:\b(?:negative prompt|cfg scale|sampler|model hash)\s*:|\b(?:seed|steps):\s*\d+)",
        )
    )
)
"""Syntax of other programs, which the text encoders read as plain words. Plain round brackets are
none, because they may enclose a remark."""

KEYWORDS = re.compile(r"\b(?:BREAK|AND|ADDCOMM|ADDBASE|ADDCOL|ADDROW)\b")
"""Words with a meaning in other programs if they are in capitals."""

TRIGGER_WORD = re.compile(r"\bimg\b")
"""The word after the class word in prompts for PhotoMaker and FastComposer."""

MAX_LISTED = 20
"""How many parts of a prompt a note lists."""


@dataclass(frozen=True)
class TextInput:
    """A prompt of a request.

    Attributes:
        text: the prompt.
        field: its field in the request.
    """

    text: str
    field: str = "prompt"

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.field.replace("_", " ")


def check_words(preset: Preset, request: GenerationRequest) -> None:
    """Refuse unknown words, and too few words for people, before any model is loaded.

    Only a tokenizer is read.

    Args:
        preset: the preset that will run the request. SDXL's tokenizer knows every word, so that
            only the miniature's and T5's are asked for unknown ones.
        request: a request.

    Raises:
        PromptError: the model does not know a word.
        RequestError: the prompt has fewer words for people than the request has people.
    """
    models = preset.models
    knows_all = models.family == "sdxl" and not models.is_miniature
    if knows_all and not (models.shows_people_by_words and len(request.people) > 1):
        return
    try:
        pipeline = resolve_path(models.pipeline)
    except WeightsError:  # loading the pipeline reports that
        return
    folder = pipeline / _tokenizer_name(preset)
    if not folder.is_dir():
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_tokens([embedding.word for embedding in request.embeddings])
    if not knows_all:
        for prompt in _user_inputs(request, preset):
            replace_unknown(tokenizer, prompt, preset)
    if models.shows_people_by_words:
        check_words_for_people(tokenizer, remove_marks(request.prompt), len(request.people))


def check_words_for_people(tokenizer: Any, prompt: str, num_people: int) -> None:
    """Refuse a prompt with fewer words for people than people, see `WORD_METHODS`.

    Args:
        tokenizer: the tokenizer of the text encoder.
        prompt: the prompt. For one person it needs no word.
        num_people: how many people the image shows.

    Raises:
        RequestError: the number of words, and the fix.
    """
    if num_people < 2:
        return
    num_words = count_class_words(prompt, tokenizer)
    if num_words < num_people:
        noun = "word" if num_words == 1 else "words"
        raise RequestError(
            f"{{0}} has {num_words} {noun} for {num_people} people; {MORE_WORDS}.", "prompt"
        )


def prepare_prompts(pipe: Any, request: GenerationRequest, preset: Preset) -> GenerationRequest:
    """Return a request with prompts that the text encoders can read; log what has no effect.

    Args:
        pipe: a pipeline of SDXL, or of FLUX or a relative.
        request: a resolved request.
        preset: the preset that runs it. Its own negative prompt is not checked: it may be longer
            than what the model reads, and is cut.

    Raises:
        PromptError: the model does not know a word.
    """
    for embedding in request.embeddings:
        if embedding.word not in f"{request.prompt}\n{request.negative_prompt}":
            logger.warning(
                "%s has no effect; write its word, %s, in a prompt", embedding.file, embedding.word
            )
    tokenizer = getattr(pipe, _tokenizer_name(preset))
    limit = request.max_sequence_length if preset.models.has_transformer else None
    if limit is not None:
        limit -= count_template_tokens(tokenizer)
    texts = {}
    for prompt in _user_inputs(request, preset):
        note_other_syntax(tokenizer, prompt, preset.models.method)
        text, signs = replace_unknown(tokenizer, prompt, preset)
        if signs:
            logger.warning(
                "the model does not know %s; left out of the %s", _enumerate(signs), prompt.name
            )
        if not preset.reads_weights:  # otherwise a long prompt is read in chunks
            note_length(tokenizer, TextInput(text, prompt.field), limit)
        texts[prompt.field] = text
    return request.model_copy(update=texts)


def _tokenizer_name(preset: Preset) -> str:
    """Return the part of a pipeline that reads the longest prompt: T5's in FLUX."""
    return "tokenizer_2" if preset.models.family == "flux" else "tokenizer"


def _user_inputs(request: GenerationRequest, preset: Preset) -> list[TextInput]:
    """Return the prompts of a request that the user wrote."""
    inputs = [TextInput(request.prompt)]
    negative_prompt = request.negative_prompt
    if negative_prompt and negative_prompt != preset.defaults.negative_prompt:
        inputs.append(TextInput(negative_prompt, "negative_prompt"))
    return inputs


def note_other_syntax(tokenizer: Any, prompt: TextInput, method: str = "pulid") -> None:
    """Log a warning that names the parts of a prompt that only other programs understand.

    Args:
        tokenizer: its words have an effect in any case, such as those of textual inversion.
        prompt: the prompt.
        method: PhotoMaker and FastComposer have a trigger word.
    """
    parts = find_other_syntax(remove_marks(prompt.text), method)
    parts = [part for part in parts if part not in tokenizer.get_added_vocab()]
    if parts:
        logger.warning(
            "syntax of other programs has no effect in the %s, it is read as plain words: %s",
            prompt.name,
            _enumerate(parts),
        )


def find_other_syntax(text: str, method: str = "pulid") -> list[str]:
    """Find syntax of other programs in a prompt: weights, alternatives, files, parameters.

    Args:
        text: the prompt.
        method: the trigger word of `PROMPT_METHODS` is other syntax for any other method.

    Returns:
        The parts in the order of the prompt, each once.
    """
    text = unicodedata.normalize("NFKC", text)  # full-width brackets
    matches = list(OTHER_SYNTAX.finditer(text))
    if not text.isupper():
        matches += KEYWORDS.finditer(text)
    if method not in PROMPT_METHODS:
        matches += TRIGGER_WORD.finditer(text)
    matches.sort(key=lambda match: match.start())
    return list(dict.fromkeys(match.group().strip() for match in matches))


def replace_unknown(
    tokenizer: Any, prompt: TextInput, preset: Preset | None = None
) -> tuple[str, list[str]]:
    """Leave out signs that a model does not know, such as "!" or an emoji, and refuse words.

    Args:
        tokenizer: the tokenizer of the text encoder.
        prompt: the prompt.
        preset: for the advice in the message.

    Returns:
        The prompt with its weights, and the signs that were left out.

    Raises:
        PromptError: names the unknown words with similar ones.
    """
    plain = _remove_tokens(tokenizer, remove_marks(prompt.text))
    words = dict.fromkeys(re.findall(r"\w+(?:['-]\w+)*", plain))
    unknown = [word for word in words if _is_unknown(tokenizer, word)]
    if unknown:
        vocabulary = [token.removesuffix("</w>") for token in tokenizer.get_vocab()]
        vocabulary = [token for token in vocabulary if re.match(r"\w", token)]
        described = " and ".join(_describe(word, vocabulary) for word in unknown)
        advice = "use words of its vocabulary"
        if preset is not None and preset.models.is_miniature:
            advice += " (`pulid world words` lists them)"
        if parts := find_other_syntax(plain):
            advice += f"; syntax of other programs has no effect: {_enumerate(parts)}"
        location = "" if prompt.field == "prompt" else f" in the {prompt.name}"
        raise PromptError(f"the model does not know {described}{location}; {advice}.", unknown)
    signs = dict.fromkeys(re.findall(r"[^\w\s]", plain))
    unknown_signs = [sign for sign in signs if _is_unknown(tokenizer, sign)]
    if not unknown_signs:
        return prompt.text, []
    tokens = _added_tokens(tokenizer)
    fragments = [
        Fragment(_replace_signs(fragment.text, unknown_signs, tokens), fragment.weight)
        for fragment in parse_weights(prompt.text)
    ]
    text = " ".join(join_fragments(fragments).split())
    if not remove_marks(text).strip() and prompt.field == "prompt":
        raise PromptError(f"the model knows nothing of the prompt {prompt.text!r}; write words.")
    return text, unknown_signs


def _replace_signs(text: str, signs: list[str], tokens: list[str]) -> str:
    """Replace signs by spaces, but not in tokens."""
    pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]
    for index in range(0, len(pieces), 2):  # what is between tokens
        for sign in signs:
            pieces[index] = pieces[index].replace(sign, " ")
    return "".join(pieces)


def _added_tokens(tokenizer: Any) -> list[str]:
    """Return the words of textual inversion, longest first."""
    added = set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    return sorted(added, key=len, reverse=True)


def _remove_tokens(tokenizer: Any, text: str) -> str:
    """Return a text without the words of textual inversion, which the model knows."""
    for token in _added_tokens(tokenizer):
        text = re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", " ", text)
    return text


def note_length(tokenizer: Any, prompt: TextInput, limit: int | None = None) -> None:
    """Log a warning that names the end of a prompt that is longer than what the model reads.

    Args:
        tokenizer: the tokenizer of the text encoder.
        prompt: the prompt.
        limit: FLUX: maximum number of tokens; by default the tokenizer's own.
    """
    ids = tokenizer(prompt.text, truncation=False, verbose=False).input_ids
    max_length = limit or tokenizer.model_max_length
    if len(ids) <= max_length:
        return
    # the last token that CLIP and T5 read ends the text
    num_read = max_length - bool(tokenizer.num_special_tokens_to_add())
    ignored = tokenizer.decode(ids[num_read:], skip_special_tokens=True).strip()
    advice = "" if limit is None else "; max_sequence_length (--text-tokens) may be up to 512"
    logger.warning(
        "the %s has %d tokens and the model reads %d; it ignores the end, %r%s",
        prompt.name,
        len(ids),
        max_length,
        ignored,
        advice,
    )


def count_template_tokens(tokenizer: Any) -> int:
    """Return how many tokens a chat template adds to a prompt, as for FLUX.2's text encoder."""
    if not getattr(tokenizer, "chat_template", None):
        return 0
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def _is_unknown(tokenizer: Any, word: str) -> bool:
    return tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids


def _describe(word: str, vocabulary: list[str]) -> str:
    """Quote an unknown word, with similar ones of the vocabulary."""
    similar = difflib.get_close_matches(word.lower(), vocabulary, 2, 0.6)
    return repr(word) + (f" (similar: {', '.join(similar)})" if similar else "")


def _enumerate(parts: list[str]) -> str:
    listed = [repr(part) for part in parts[:MAX_LISTED]]
    return ", ".join(listed) + (" ..." if len(parts) > MAX_LISTED else "")
