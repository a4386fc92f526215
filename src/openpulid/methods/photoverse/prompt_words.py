"""Words of an identity in the place of the prompt's class word.

PhotoMaker's hooks encode each prompt a second time with the class word repeated. Here the text
encoders read the identity's words in these places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from openpulid.errors import OptionError
from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.photomaker.prompt_fusion import PromptFusion


class WordInsertion(PromptFusion):
    """State of one pipeline while the words of identities are in use.

    Args:
        state: of the pipeline.
        words: (m, word width) per identity, for both text encoders side by side.
        widths: of the words of each text encoder.
        span: of the schedule in which the words are used.
    """

    method: ClassVar[str] = "PhotoVerse"

    def __init__(
        self, state: PipelineState, words: Sequence[Tensor], widths: Sequence[int], span: Span
    ) -> None:
        super().__init__(state, None, words, span)
        self.widths = widths

    def encode_repeated(
        self,
        index: int,
        encoder: nn.Module,
        input_ids: Tensor,
        positions: Sequence[int],
        options: Mapping[str, Any],
    ) -> list[Any]:
        """Encode prompts with the words of each identity, see `PromptFusion.encode_repeated`."""
        embeddings: nn.Module = encoder.get_input_embeddings()  # type: ignore[operator]
        outputs = []
        for words in self.tokens:
            vectors = words.split(list(self.widths), dim=-1)[index]

            def insert(
                module: nn.Module, args: Any, output: Tensor, vectors: Tensor = vectors
            ) -> Tensor:
                changed = output.clone()
                for row, position in enumerate(positions):
                    count = len(changed[row, position : position + len(vectors)])
                    changed[row, position : position + count] = vectors[:count].to(changed)
                return changed

            handle = embeddings.register_forward_hook(insert)
            try:
                outputs.append(encoder(input_ids, **options))
            finally:
                handle.remove()
        return outputs

    def fuse_words(self, states: Tensor, position: int, tokens: Tensor) -> Tensor:
        """Return the states of a prompt; its words were read by the text encoders.

        Raises:
            OptionError: the class word is too late in the prompt.
        """
        if position + len(tokens) >= len(states):  # the last position is that of the end token
            raise OptionError(
                "the words of PhotoVerse do not fit, because the class word is too late in the "
                "prompt; move it forward."
            )
        return states
