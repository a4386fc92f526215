"""Hooks that replace the prompt by one that names identities.

Hooks on the text encoders encode each prompt a second time, changed by the method. A hook on the
U-Net replaces the prompt by the changed one, whose words the method can fuse with identity tokens.

Shapes: B batch of the U-Net, L tokens of a prompt, D its width, D' width of one text encoder, T
identity tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError
from openpulid.methods.adapter import check_projections_are_called
from openpulid.methods.hooks import (
    HookResult,
    PipelineState,
    Span,
    UNetCall,
    identity_count_error,
)
from openpulid.methods.lora import low_rank_hook

CLASS_WORDS = (
    "person", "man", "woman", "boy", "girl", "child", "lady", "guy", "baby", "toddler", "kid",
    "teenager", "gentleman", "male", "female", "people", "persons", "men", "women", "boys", "girls",
    "children", "ladies", "guys", "babies", "toddlers", "kids", "teenagers", "gentlemen",
)  # fmt: skip
"""Words that can stand for a person. The first ones in a prompt are used; without one, "person" is
inserted."""

MORE_WORDS = (
    'write one word for each of them, such as "a man and a woman", or mark other words by "img" '
    "after them"
)
"""Advice for a prompt with fewer words for people than people."""

TRIGGER_WORD = "img"
"""In PhotoMaker's prompts, the word after the class word. It is read and left out."""


@dataclass(frozen=True)
class Encoding:
    """What one text encoder gives for one prompt.

    Attributes:
        states: (L, D').
        pooled: (P,).
        positions: of the words that stand for people.
    """

    states: Tensor
    pooled: Tensor
    positions: Sequence[int] = ()


Encode = Callable[[Tensor], list[Encoding]]
"""Encodes token ids (P, L), without positions."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt encoded by one text encoder.

    Attributes:
        original: states (L, D') of the prompt as it is.
        plain: the prompt without the trigger word.
        changed: entry of the people in use -> the prompt that names them.
    """

    original: Tensor
    plain: Encoding
    changed: Mapping[int, Encoding]


class PromptFusion:
    """State of one pipeline while identities are in use. Subclasses change the prompt.

    Args:
        state: of the pipeline.
        num_entries: one entry of people per prompt, or 1 for all prompts.
        span: of the schedule in which the changed prompt is used.

    Attributes:
        method: how messages call the method.
        rows: per row of the current call, the entry that it shows and the positions of its words in
            the second text encoder's prompt; None for a row with the plain prompt.
    """

    method: ClassVar[str] = ""

    def __init__(self, state: PipelineState, num_entries: int, span: Span) -> None:
        self.state = state
        self.num_entries = num_entries
        self.span = span
        self.prompts: tuple[list[EncodedPrompt], list[EncodedPrompt]] = ([], [])
        self.rows: list[tuple[int, Sequence[int]] | None] = []
        self._reentrant = False  # the second call of a text encoder, by its own hook
        self._unet_called = False
        self._has_trigger_word = False

    def change_prompts(
        self, index: int, tokenizer: Any, input_ids: Tensor, encode: Encode
    ) -> list[Mapping[int, Encoding]]:
        """Encode prompts so that they name the people.

        Args:
            index: of the text encoder.
            tokenizer: of that encoder.
            input_ids: (P, L).
            encode: calls the text encoder.

        Returns:
            For each prompt the encoding by entry.
        """
        raise NotImplementedError

    def fuse(self, states: Tensor, positions: Sequence[int], entry: int) -> Tensor:
        """Fuse the words of a changed prompt (L, D) with the people of an entry."""
        return states

    @contextmanager
    def register(
        self, lora: Mapping[str, tuple[Tensor, Tensor]] | None = None, scale: float = 1.0
    ) -> Iterator[None]:
        """Register all hooks while the context is open.

        Args:
            lora: name of a layer of the U-Net -> its low-rank matrices.
            scale: their weight.
        """
        pipe = self.state.target
        unet = self.state.network
        if lora:
            check_projections_are_called(unet)
        encoders = ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
        with ExitStack() as hooks:
            for index, (encoder, tokenizer) in enumerate(encoders):
                capture = partial(self._capture_prompt, index, tokenizer)
                handle = encoder.register_forward_hook(capture, with_kwargs=True)
                hooks.callback(handle.remove)
            for name, (down, up) in (lora or {}).items():
                low_rank = low_rank_hook(down, scale * up)
                handle = unet.get_submodule(name).register_forward_hook(low_rank)
                hooks.callback(handle.remove)
            # before other hooks: a ControlNet must read the changed prompt
            handle = unet.register_forward_pre_hook(
                self._swap_prompt, with_kwargs=True, prepend=True
            )
            hooks.callback(handle.remove)
            yield

    def _capture_prompt(
        self, index: int, tokenizer: Any, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Encode a text encoder's input again, plain and changed (forward hook of the encoder)."""
        if self._reentrant:
            return
        has_failed = index == 0 and len(self.prompts[0]) != len(self.prompts[1])
        if self._unet_called or has_failed:  # a new run begins: forget the prompts of the last one
            self.prompts = ([], [])
            self._unet_called = False
            self._has_trigger_word = False
        input_ids = args[0] if args else kwargs["input_ids"]
        plain_ids = remove_trigger_word(input_ids, tokenizer)
        options = {name: value for name, value in kwargs.items() if name != "input_ids"}
        layer = -((getattr(self.state.target, "clip_skip", None) or 0) + 2)

        def split(output: Any) -> list[Encoding]:
            return [
                Encoding(states, pooled)
                for states, pooled in zip(output.hidden_states[layer], output[0], strict=True)
            ]

        def encode(ids: Tensor) -> list[Encoding]:
            return split(module(ids, **options))

        originals = split(output)
        plain = originals
        self._reentrant = True
        try:
            changed = self.change_prompts(index, tokenizer, input_ids, encode)
            if not torch.equal(plain_ids, input_ids):
                self._has_trigger_word = True
                plain = encode(plain_ids)
        finally:
            self._reentrant = False
        for row in zip(originals, plain, changed, strict=True):
            self.prompts[index].append(EncodedPrompt(row[0].states, row[1], row[2]))

    def _swap_prompt(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HookResult:
        """Replace the prompt and its pooled embedding (forward pre-hook of the U-Net)."""
        self._unet_called = True
        call = UNetCall.parse(args, kwargs)
        is_active = self.span.contains(self.state.position(call.timestep))
        self.rows = [None] * len(call.text)
        if not is_active and not self._has_trigger_word:
            return args, kwargs
        states = list(call.text)
        conditions = dict(kwargs["added_cond_kwargs"])
        pooled = list(conditions["text_embeds"])

        # the negative half keeps its prompt
        first = len(states) // 2 if self.state.is_guided() else 0
        num_images = len(states) - first
        if num_images % self.num_entries:
            raise identity_count_error(self.num_entries, num_images)
        images_per_entry = num_images // self.num_entries
        for image in range(num_images):
            row = first + image
            if is_active:
                entry = image // images_per_entry
                states[row], pooled[row], positions = self._change(states[row], entry)
                self.rows[row] = (entry, positions)
            else:
                states[row], pooled[row] = self._plain(states[row], pooled[row])

        # sample and timestep stay positional; what was positional after them is passed by name
        conditions["text_embeds"] = torch.stack(pooled)
        return args[:2], kwargs | {
            "encoder_hidden_states": torch.stack(states),
            "added_cond_kwargs": conditions,
        }

    def _plain(self, original: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return one prompt (L, D) without its trigger word, and its pooled embedding (P,)."""
        encoded = self._find(original)
        if encoded is None:
            return original, pooled
        first, second = encoded
        states = torch.cat([first.plain.states, second.plain.states], -1)
        return states.to(original), second.plain.pooled.to(original)

    def _find(
        self, original: Tensor, entry: int | None = None
    ) -> tuple[EncodedPrompt, EncodedPrompt] | None:
        """Return what both text encoders gave for a prompt (L, D); None for foreign embeddings.

        Args:
            original: states of the prompt as it is.
            entry: that the prompt names; of equal prompts each may name another one.
        """
        for first, second in zip(*self.prompts, strict=True):
            states = torch.cat([first.original, second.original], -1)
            is_changed = entry is None or entry in first.changed
            if is_changed and torch.equal(states.to(original), original):
                return first, second
        return None

    def _change(self, original: Tensor, entry: int) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Replace one prompt (L, D) by the one that names the people of an entry.

        Returns:
            The changed prompt (L, D), its pooled embedding (P,), and the positions of its words.

        Raises:
            OptionError: The prompt was passed as embeddings, or its words do not fit the people.
        """
        encoded = self._find(original, entry)
        if encoded is None and self._find(original) is not None:
            raise OptionError(
                f"the words of {self.method} do not fit, because the word for the person is too "
                "late in the prompt; move it forward."
            )
        if encoded is None:
            raise OptionError(
                f"{self.method} changes the text of the prompt; "
                "pass prompts instead of prompt embeddings while it is in use."
            )
        first, second = (prompt.changed[entry] for prompt in encoded)
        states = torch.cat([first.states, second.states], -1)
        fused = self.fuse(states, second.positions, entry)
        return fused.to(original), second.pooled.to(original), second.positions


def fuse_words(
    states: Tensor, positions: Sequence[int], tokens: Tensor, fuse_module: nn.Module
) -> Tensor:
    """Fuse words of a prompt with one identity token each.

    Args:
        states: (L, D) of the prompt.
        positions: T positions of words.
        tokens: (T, D).
        fuse_module: maps words (T, D) and tokens (T, D) to words (T, D).

    Returns:
        (L, D), in the dtype of the tokens.
    """
    fused = states.to(tokens, copy=True)
    words = list(positions)
    fused[words] = fuse_module(fused[words], tokens).to(fused)  # autocast changes the dtype
    return fused


def mark_class_words(input_ids: Tensor, tokenizer: Any) -> tuple[Tensor, list[list[int]]]:
    """Find the words that stand for people in prompts, and remove the trigger words.

    They are the words before the trigger words. In a prompt without a trigger word they are all of
    `CLASS_WORDS`; without these, "person" is inserted at its beginning.

    Args:
        input_ids: (P, L).
        tokenizer: that encoded the prompts.

    Returns:
        (P, L), and the positions of the words in each prompt, at least one.
    """
    class_ids = _class_word_ids(tokenizer)
    trigger = _trigger_ids(tokenizer)
    rows = []
    places = []
    for row in input_ids.tolist():
        words, positions = _find_words(row, trigger, class_ids, tokenizer)
        if not positions:
            positions = [1]  # after the start token
            words.insert(1, _first_token(tokenizer, CLASS_WORDS[0]))
        rows.append(_fit(words, row, tokenizer))
        places.append(positions)
    return torch.tensor(rows, device=input_ids.device), places


def count_class_words(prompt: str, tokenizer: Any) -> int:
    """Count the words of a prompt that stand for people, see `mark_class_words`.

    Words after the end of what the text encoder reads are not counted.

    Args:
        prompt: one prompt.
        tokenizer: of the text encoder whose words the method fuses.

    Returns:
        The number of words; 0 for a prompt in which "person" would be inserted.
    """
    ids = tokenizer(prompt, truncation=True, verbose=False).input_ids
    _, positions = _find_words(ids, _trigger_ids(tokenizer), _class_word_ids(tokenizer), tokenizer)
    return len(positions)


def repeat_class_word(input_ids: Tensor, tokenizer: Any, count: int) -> tuple[Tensor, list[int]]:
    """Repeat the first word of each prompt that stands for a person, see `mark_class_words`.

    The end token stays when a prompt becomes too long: the pooled embedding is read there.

    Args:
        input_ids: (P, L).
        tokenizer: that encoded the prompts.
        count: of the word.

    Returns:
        (P, L), and the first position of the word in each prompt.
    """
    marked, places = mark_class_words(input_ids, tokenizer)
    positions = [first for first, *_ in places]
    rows = []
    for row, position in zip(marked.tolist(), positions, strict=True):
        repeated = row[:position] + [row[position]] * count + row[position + 1 :]
        rows.append(_fit(repeated, row, tokenizer))
    return torch.tensor(rows, device=input_ids.device), positions


def remove_trigger_word(input_ids: Tensor, tokenizer: Any) -> Tensor:
    """Remove the trigger word from each prompt.

    Args:
        input_ids: (P, L).
        tokenizer: that encoded the prompts.

    Returns:
        (P, L), padded at the end.
    """
    trigger = _trigger_ids(tokenizer)
    rows = []
    for row in input_ids.tolist():
        words, _ = _split_trigger(row, trigger, tokenizer)
        rows.append(words + row[-1:] * (len(row) - len(words)))
    return torch.tensor(rows, device=input_ids.device)


def _fit(words: list[int], row: list[int], tokenizer: Any) -> list[int]:
    """Pad or cut a changed prompt to the length of the original row; its end token stays."""
    fitted = (words + row[-1:] * len(row))[: len(row)]
    if tokenizer.eos_token_id not in fitted[1:]:
        fitted[-1] = tokenizer.eos_token_id
    return fitted


def _find_words(
    row: Sequence[int], trigger: Sequence[int], class_ids: set[int], tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Find the words that stand for people in a prompt, and remove the trigger words.

    Returns:
        The other tokens, and the positions of the words.
    """
    words, positions = _split_trigger(row, trigger, tokenizer)
    if not positions:
        positions = [index for index, token in enumerate(words) if token in class_ids]
    return words, positions


def _split_trigger(
    row: Sequence[int], trigger: Sequence[int], tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Remove the trigger words from a prompt.

    Returns:
        The other tokens, and the positions of the words before the trigger words.
    """
    words: list[int] = []
    positions: dict[int, None] = {}
    index = 0
    while index < len(row):
        if trigger and list(row[index : index + len(trigger)]) == list(trigger):
            position = _last_word(words, tokenizer)
            if position is not None:
                positions[position] = None
            index += len(trigger)
        else:
            words.append(row[index])
            index += 1
    return words, list(positions)


def _last_word(words: Sequence[int], tokenizer: Any) -> int | None:
    """Return the position of the last token that is a word, not a sign; None if there is none."""
    for position in range(len(words) - 1, 0, -1):  # the first is the start token
        token = tokenizer.convert_ids_to_tokens(words[position]).removesuffix("</w>")
        if any(map(str.isalnum, token)):
            return position
    return None


def _trigger_ids(tokenizer: Any) -> list[int]:
    """Return the tokens of the trigger word; none if the tokenizer does not know it."""
    ids: list[int] = tokenizer([TRIGGER_WORD], add_special_tokens=False).input_ids[0]
    return [] if tokenizer.unk_token_id in ids else ids


def _class_word_ids(tokenizer: Any) -> set[int]:
    """Return the tokens of the class words.

    CLIP marks the end of a word: its token `man` without the mark is a part of a longer word.
    """
    unknown = {tokenizer.unk_token_id, None}
    ids = set()
    for word in CLASS_WORDS:
        end = tokenizer.convert_tokens_to_ids(f"{word}</w>")
        ids.add(tokenizer.convert_tokens_to_ids(word) if end in unknown else end)
    return ids - unknown


def _first_token(tokenizer: Any, word: str) -> int:
    ids: list[int] = tokenizer([word], add_special_tokens=False).input_ids[0]
    return ids[0]
