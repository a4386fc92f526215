"""PhotoMaker's change of the prompt: the class word is repeated and fused with identity tokens.

Shapes: L tokens of a prompt, D its width, T identity tokens, n reference images, k tokens of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.photomaker.encoders import PhotoMakerEncoder
from openpulid.methods.prompt_fusion import (
    Encode,
    Encoding,
    PromptFusion,
    fuse_words,
    repeat_class_word,
)


class RepeatedWordFusion(PromptFusion):
    """PhotoMaker on one pipeline: the class word, once per token, is fused with the tokens.

    Args:
        state: of the pipeline.
        encoder: of the adapter.
        people: the identity of each prompt, or one for all prompts.
        span: see `PromptFusion`.

    Raises:
        OptionError: The identities have different numbers of reference images.
    """

    method: ClassVar[str] = "PhotoMaker"

    def __init__(
        self,
        state: PipelineState,
        encoder: PhotoMakerEncoder,
        people: Sequence[Sequence[Identity]],
        span: Span,
    ) -> None:
        tokens = [encode_identity(encoder, identity) for (identity,) in people]
        if len({len(identity) for identity in tokens}) > 1:
            raise OptionError(
                "PhotoMaker needs the same number of reference images for each identity of a batch."
            )
        super().__init__(state, len(tokens), span)
        self.fuse_module = encoder.fuse_module
        self.tokens = tokens

    def change_prompts(
        self, index: int, tokenizer: Any, input_ids: Tensor, encode: Encode
    ) -> list[Mapping[int, Encoding]]:
        """Repeat the class word of each prompt, see `PromptFusion.change_prompts`."""
        ids, positions = repeat_class_word(input_ids, tokenizer, len(self.tokens[0]))
        return [
            dict.fromkeys(range(self.num_entries), replace(encoding, positions=(position,)))
            for encoding, position in zip(encode(ids), positions, strict=True)
        ]

    def fuse(self, states: Tensor, positions: Sequence[int], entry: int) -> Tensor:
        """Fuse the repeated class word, see `fuse_class_word`."""
        return fuse_class_word(states, positions[0], self.tokens[entry], self.fuse_module)


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
    end = position + len(tokens)
    if end >= len(states):  # the last position is that of the end token
        raise OptionError(
            f"PhotoMaker repeats the class word {len(tokens)} times, once per token, "
            "which does not fit because the word is too late in the prompt; "
            "move it forward or use fewer reference images."
        )
    return fuse_words(states, range(position, end), tokens, fuse_module)


def encode_identity(encoder: PhotoMakerEncoder, identity: Identity) -> Tensor:
    """Compute the tokens of all reference images of an identity.

    Returns:
        (n * k, D).

    Raises:
        OptionError: The identity was created by another extractor.
    """
    states = read_states(
        identity,
        encoder.config.hidden_size,
        "PhotoMaker",
        "create it again with `pulid identify --method photomaker`",
    )
    states = states.to(encoder.device, encoder.dtype)
    embeddings = None
    if encoder.face_dim:
        embeddings = identity.id_cond[0, :, : encoder.face_dim].to(states)
    return encoder.encode(states, embeddings).flatten(0, 1)


def read_states(identity: Identity, width: int, method: str, fix: str) -> Tensor:
    """Return the last states of a method's own vision encoder, (n, 1 + N, width).

    Args:
        identity: with features of that encoder.
        width: of the encoder.
        method: how messages call it.
        fix: what to do with an identity of another extractor.

    Raises:
        OptionError: The identity was created by another extractor.
    """
    if len(identity.hidden) != 2 or identity.hidden[0].shape[-1] != width:
        raise OptionError(f"this identity has no features of {method}'s vision encoder; {fix}.")
    return identity.hidden[0][0].unflatten(0, (identity.photos, -1))
