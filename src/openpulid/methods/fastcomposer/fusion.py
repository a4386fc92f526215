"""FastComposer's change of the prompt: words for people are fused with one token each.

Shapes: L tokens of a prompt, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.fastcomposer.encoders import FastComposerEncoder
from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.photomaker.fusion import read_states
from openpulid.methods.prompt_fusion import (
    MORE_WORDS,
    Encode,
    Encoding,
    PromptFusion,
    fuse_words,
    mark_class_words,
)


class MarkedWordFusion(PromptFusion):
    """FastComposer on one pipeline: word k for a person is fused with person k.

    Args:
        state: of the pipeline.
        encoder: of the adapter.
        people: the identities of each prompt, or one entry for all prompts.
        span: see `PromptFusion`.
    """

    method: ClassVar[str] = "FastComposer"

    def __init__(
        self,
        state: PipelineState,
        encoder: FastComposerEncoder,
        people: Sequence[Sequence[Identity]],
        span: Span,
    ) -> None:
        super().__init__(state, len(people), span)
        self.fuse_module = encoder.postfuse_module
        self.tokens = [
            torch.cat([encode_identity(encoder, identity) for identity in identities])
            for identities in people
        ]

    def change_prompts(
        self, index: int, tokenizer: Any, input_ids: Tensor, encode: Encode
    ) -> list[Mapping[int, Encoding]]:
        """Mark the words of each prompt, see `PromptFusion.change_prompts`."""
        ids, places = mark_class_words(input_ids, tokenizer)
        return [
            dict.fromkeys(range(self.num_entries), replace(encoding, positions=positions))
            for encoding, positions in zip(encode(ids), places, strict=True)
        ]

    def fuse(self, states: Tensor, positions: Sequence[int], entry: int) -> Tensor:
        """Fuse the first words of a prompt (L, D) with the people of an entry.

        Raises:
            OptionError: There are more people than words.
        """
        tokens = self.tokens[entry]
        if len(positions) < len(tokens):
            raise OptionError(
                f"the prompt names {len(positions)} of {len(tokens)} people; {MORE_WORDS}."
            )
        return fuse_words(states, positions[: len(tokens)], tokens, self.fuse_module)


def encode_identity(encoder: FastComposerEncoder, identity: Identity) -> Tensor:
    """Compute the token of an identity, (1, D): the mean of its reference images' tokens.

    Raises:
        OptionError: The identity was created by another extractor.
    """
    image_encoder = encoder.image_encoder
    states = read_states(
        identity,
        image_encoder.config.hidden_size,
        "FastComposer",
        "create it again with `pulid identify --method fastcomposer --adapter FILE`",
    )
    tokens = encoder.encode(states.to(image_encoder.device, image_encoder.dtype))
    return tokens.mean(0, keepdim=True)
