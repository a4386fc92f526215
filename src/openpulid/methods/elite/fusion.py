"""ELITE's change of the prompt: the word for a person gets embeddings of the person's image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.elite.encoders import Mappers
from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.word_fusion import WordFusion


class ImageWordFusion(WordFusion):
    """ELITE on one pipeline.

    Args:
        state: of the pipeline.
        mappers: of the adapter.
        people: the identity of each prompt, or one for all prompts.
        span: see `PromptFusion`.

    Raises:
        OptionError: The identities have different numbers of reference images.
    """

    method: ClassVar[str] = "ELITE"

    def __init__(
        self,
        state: PipelineState,
        mappers: Mappers,
        people: Sequence[Sequence[Identity]],
        span: Span,
    ) -> None:
        self.people = [identity for (identity,) in people]
        if len({identity.photos for identity in self.people}) > 1:
            raise OptionError(
                "identities used together must have the same number of reference images."
            )
        super().__init__(state, list(mappers.encode_words(self.people)), span)
