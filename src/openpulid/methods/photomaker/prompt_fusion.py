"""Hooks that replace the prompt by one whose class word is fused with identity tokens.

Hooks on the text encoders encode each prompt a second time with the class word repeated. A hook on
the U-Net replaces the prompt by the fused one.

Shapes: B batch of the U-Net, L tokens of a prompt, D its width, T identity tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError
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
"""Words that can be fused. The first one in a prompt is used; without one, "person" is inserted."""

TRIGGER_WORD = "img"
"""In the authors' prompts, the word after the class word. It is read and left out."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt encoded by one text encoder.

    Attributes:
        original: states (L, D') of the prompt as it is.
        plain: states (L, D') without the trigger word.
        plain_pooled: (P,) of the latter.
        repeated: states (I, L, D') with the class word repeated: for each of I identities, or for
            all of them (I = 1).
        pooled: (I, P) of the latter.
        index: first position of the class word.
    """

    original: Tensor
    plain: Tensor
    plain_pooled: Tensor
    repeated: Tensor
    pooled: Tensor
    index: int


class PromptFusion:
    """State of one pipeline while an identity is in use.

    A subclass that encodes the repeated word in another way overrides `encode_repeated` and
    `fuse_words`.

    Args:
        state: of the pipeline.
        fuse_module: fuses a word's embedding (T, D) with tokens (T, D).
        tokens: (T, D) per identity, one identity per prompt or one for all.
        span: of the schedule in which the fused prompt is used.

    Raises:
        OptionError: The identities have different numbers of reference images.
    """

    method: ClassVar[str] = "PhotoMaker"
    """How messages call the method."""

    def __init__(
        self,
        state: PipelineState,
        fuse_module: nn.Module | None,
        tokens: Sequence[Tensor],
        span: Span,
    ) -> None:
        if len({len(identity) for identity in tokens}) > 1:
            raise OptionError(
                f"{self.method} needs the same number of reference images for each identity of a "
                "batch."
            )
        self.state = state
        self.fuse_module = fuse_module
        self.tokens = tokens
        self.span = span
        self.prompts: tuple[list[EncodedPrompt], list[EncodedPrompt]] = ([], [])
        self._reentrant = False  # the second call of a text encoder, by its own hook
        self._unet_called = False
        self._has_trigger_word = False

    @contextmanager
    def register(self, lora: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Iterator[None]:
        """Register all hooks while the context is open.

        Args:
            lora: name of a layer of the U-Net -> its low-rank matrices.
            scale: their weight.
        """
        pipe = self.state.target
        unet = self.state.network
        encoders = ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
        with ExitStack() as hooks:
            for index, (encoder, tokenizer) in enumerate(encoders):
                capture = partial(self._capture_prompt, index, tokenizer)
                handle = encoder.register_forward_hook(capture, with_kwargs=True)
                hooks.callback(handle.remove)
            for name, (down, up) in lora.items():
                low_rank = low_rank_hook(down, scale * up)
                handle = unet.get_submodule(name).register_forward_hook(low_rank)
                hooks.callback(handle.remove)
            # before other hooks: a ControlNet must read the fused prompt
            handle = unet.register_forward_pre_hook(
                self._swap_prompt, with_kwargs=True, prepend=True
            )
            hooks.callback(handle.remove)
            yield

    @torch.no_grad()
    def _capture_prompt(
        self, index: int, tokenizer: Any, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Encode a text encoder's input again, plain and with the class word repeated.

        Forward hook of the text encoder.
        """
        if self._reentrant:
            return
        if self._unet_called:  # a new run begins: forget the prompts of the last one
            self.prompts = ([], [])
            self._unet_called = False
            self._has_trigger_word = False
        input_ids = args[0] if args else kwargs["input_ids"]
        repeated_ids, positions = repeat_class_word(input_ids, tokenizer, len(self.tokens[0]))
        plain_ids = remove_trigger_word(input_ids, tokenizer)
        options = {name: value for name, value in kwargs.items() if name != "input_ids"}
        self._reentrant = True
        try:
            repeated = self.encode_repeated(index, module, repeated_ids, positions, options)
            plain = output
            if not torch.equal(plain_ids, input_ids):
                self._has_trigger_word = True
                plain = module(plain_ids, **options)
        finally:
            self._reentrant = False
        layer = -((getattr(self.state.target, "clip_skip", None) or 0) + 2)
        for row, position in enumerate(positions):
            self.prompts[index].append(
                EncodedPrompt(
                    output.hidden_states[layer][row],
                    plain.hidden_states[layer][row],
                    plain[0][row],
                    torch.stack([variant.hidden_states[layer][row] for variant in repeated]),
                    torch.stack([variant[0][row] for variant in repeated]),
                    position,
                )
            )

    def encode_repeated(
        self,
        index: int,
        encoder: nn.Module,
        input_ids: Tensor,
        positions: Sequence[int],
        options: Mapping[str, Any],
    ) -> list[Any]:
        """Encode prompts whose class word is repeated, once for all identities or once for each.

        Args:
            index: of the text encoder.
            encoder: the text encoder.
            input_ids: (P, L).
            positions: first position of the class word in each prompt.
            options: further arguments of the text encoder.
        """
        return [encoder(input_ids, **options)]

    def fuse_words(self, states: Tensor, position: int, tokens: Tensor) -> Tensor:
        """Fuse the class words of a prompt with tokens, see `fuse_class_word`."""
        assert self.fuse_module is not None
        return fuse_class_word(states, position, tokens, self.fuse_module)

    def _swap_prompt(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HookResult:
        """Replace the prompt and its pooled embedding (forward pre-hook of the U-Net)."""
        self._unet_called = True
        call = UNetCall.parse(args, kwargs)
        is_active = self.span.contains(self.state.position(call.timestep))
        if not is_active and not self._has_trigger_word:
            return args, kwargs
        states = call.text.clone()
        conditions = dict(kwargs["added_cond_kwargs"])
        pooled = conditions["text_embeds"].clone()

        # the negative half keeps its prompt
        first = len(states) // 2 if self.state.is_guided() else 0
        num_images = len(states) - first
        if num_images % len(self.tokens):
            raise identity_count_error(len(self.tokens), num_images)
        images_per_identity = num_images // len(self.tokens)
        for image in range(num_images):
            row = first + image
            if is_active:
                identity = image // images_per_identity
                states[row], pooled[row] = self._fuse(states[row], identity)
            else:
                states[row], pooled[row] = self._plain(states[row], pooled[row])

        # sample and timestep stay positional; what was positional after them is passed by name
        conditions["text_embeds"] = pooled
        return args[:2], kwargs | {
            "encoder_hidden_states": states,
            "added_cond_kwargs": conditions,
        }

    def _plain(self, original: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return one prompt (L, D) without its trigger word, and its pooled embedding (P,)."""
        encoded = self._find(original)
        if encoded is None:
            return original, pooled
        first, second = encoded
        states = torch.cat([first.plain, second.plain], -1)
        return states.to(original), second.plain_pooled.to(original)

    def _find(self, original: Tensor) -> tuple[EncodedPrompt, EncodedPrompt] | None:
        """Return what both text encoders gave for a prompt (L, D); None for foreign embeddings."""
        for first, second in zip(*self.prompts, strict=True):
            states = torch.cat([first.original, second.original], -1)
            if torch.equal(states.to(original), original):
                return first, second
        return None

    def _fuse(self, original: Tensor, identity: int) -> tuple[Tensor, Tensor]:
        """Fuse one prompt (L, D) with the tokens of an identity.

        Returns:
            The fused prompt (L, D) and its pooled embedding (P,).

        Raises:
            OptionError: The prompt was passed as embeddings, or its class word is too late.
        """
        encoded = self._find(original)
        if encoded is None:
            raise OptionError(
                f"{self.method} changes the text of the prompt; "
                "pass prompts instead of prompt embeddings while it is in use."
            )
        first, second = encoded
        variant = identity if len(first.repeated) > 1 else 0
        states = torch.cat([first.repeated[variant], second.repeated[variant]], -1)
        fused = self.fuse_words(states, second.index, self.tokens[identity])
        return fused.to(original), second.pooled[variant].to(original)


def fuse_class_word(
    states: Tensor, position: int, tokens: Tensor, fuse_module: nn.Module
) -> Tensor:
    """Fuse each repetition of the class word with one identity token.

    Args:
        states: (L, D) of a prompt of `repeat_class_word`.
        position: first position of the class word.
        tokens: (T, D) of the identity.
        fuse_module: of the adapter.

    Returns:
        (L, D), in the dtype of the tokens.

    Raises:
        OptionError: The class word is too late in the prompt.
    """
    fused = states.to(tokens, copy=True)
    words = slice(position, position + len(tokens))
    if words.stop >= len(fused):  # the last position is that of the end token
        raise OptionError(
            f"PhotoMaker repeats the class word {len(tokens)} times, once per token, "
            "which does not fit because the word is too late in the prompt; "
            "move it forward or use fewer reference images."
        )
    fused[words] = fuse_module(fused[words], tokens)
    return fused


def repeat_class_word(input_ids: Tensor, tokenizer: Any, count: int) -> tuple[Tensor, list[int]]:
    """Repeat the class word of each prompt, or insert "person" before a prompt without one.

    The class word is the one before the trigger word, which is left out. Without a trigger word it
    is the first of `CLASS_WORDS`. The end token stays when a prompt becomes too long: the pooled
    embedding is read there.

    Args:
        input_ids: (P, L).
        tokenizer: that encoded the prompts.
        count: of the word.

    Returns:
        (P, L), and the first position of the word in each prompt.
    """
    class_ids = _class_word_ids(tokenizer)
    trigger = _trigger_ids(tokenizer)
    rows = []
    positions = []
    for row in input_ids.tolist():
        words, position = _split_trigger(row, trigger, tokenizer)
        if position is None:
            matches = [index for index, token in enumerate(words) if token in class_ids]
            position = matches[0] if matches else None
        if position is not None:
            token = words[position]
            tail = words[position + 1 :]
        else:
            position = 1  # after the start token
            token = _first_token(tokenizer, CLASS_WORDS[0])
            tail = words[position:]
        padding = row[-1:] * len(row)
        repeated = (words[:position] + [token] * count + tail + padding)[: len(row)]
        if tokenizer.eos_token_id not in repeated[position + count :]:
            repeated[-1] = tokenizer.eos_token_id
        rows.append(repeated)
        positions.append(position)
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


def _split_trigger(
    row: Sequence[int], trigger: Sequence[int], tokenizer: Any
) -> tuple[list[int], int | None]:
    """Remove the trigger word from a prompt.

    Returns:
        The other tokens, and the position of the class word before the first trigger word. None
        without a trigger word, or if it is the first word.
    """
    words: list[int] = []
    position = None
    index = 0
    while index < len(row):
        if trigger and list(row[index : index + len(trigger)]) == list(trigger):
            if position is None:
                position = _last_word(words, tokenizer)
            index += len(trigger)
        else:
            words.append(row[index])
            index += 1
    return words, position


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
    """Return the tokens of the class words, also in CLIP's form at the end of a word."""
    ids = set()
    for word in CLASS_WORDS:
        for form in (word, f"{word}</w>"):
            ids.add(tokenizer.convert_tokens_to_ids(form))
    return ids - {tokenizer.unk_token_id, None}


def _first_token(tokenizer: Any, word: str) -> int:
    ids: list[int] = tokenizer([word], add_special_tokens=False).input_ids[0]
    return ids[0]
