"""PhotoVerse (arXiv 2309.05793), a re-implementation from the paper, in any SDXL pipeline.

There is no official code and there are no published weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoint_kinds import PHOTOVERSE, CheckpointKind
from openpulid.methods.hooks import Span
from openpulid.methods.level_mapper import NUM_LEVELS, read_levels
from openpulid.methods.person_adapter import PersonAdapter, list_identities
from openpulid.methods.photoverse.encoders import PhotoVerseNetworks
from openpulid.methods.photoverse.injection import Fusion, check_pipeline, open_person
from openpulid.methods.second_attention import load_networks


class PhotoVerse(PersonAdapter[PhotoVerseNetworks]):
    """Words in the prompt and visual tokens in the cross-attention, both of one reference image.

    Args:
        networks: of a file.
    """

    slot: ClassVar[str] = "prompt"
    kinds: ClassVar[tuple[CheckpointKind, ...]] = (PHOTOVERSE,)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PhotoVerse:
        """Load a file with the names of `PhotoVerseNetworks`.

        Raises:
            WeightsError: The file does not exist, is damaged, or is another kind of adapter.
        """
        cls.check_file(path)
        message = f"{path} is no complete file of PhotoVerse"
        return cls(load_networks(PhotoVerseNetworks.build, path, message))

    def check(self, target: Any) -> None:
        """Raise an error if the adapter does not fit a pipeline of SDXL.

        Raises:
            OptionError: the target is no pipeline of SDXL.
            WeightsError: the adapter was trained for another base model.
        """
        check_pipeline(target, self.networks)

    def encode(self, people: Sequence[Identity]) -> tuple[Tensor, Tensor]:
        """Compute the words and the visual tokens of identities; several images are averaged.

        Returns:
            (P, 5, word width) and (P, 5, C).

        Raises:
            IdentityError: an identity lacks the five levels of a vision encoder, or has others.
        """
        networks = self.networks
        like = next(networks.parameters())
        levels = read_levels(people, networks.text_adapter.states_dim, "PhotoVerse", like)
        counts = [identity.photos for identity in people]
        words, tokens = (
            torch.stack([images.mean(0) for images in adapter.words(levels).split(counts)])
            for adapter in (networks.text_adapter, networks.image_adapter)
        )
        return words, tokens

    @contextmanager
    def use(
        self,
        people: Identity | Sequence[Identity],
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        num_words: int = 1,
        fusion: Fusion | None = None,
        pipe: Any = None,
    ) -> Iterator[PhotoVerse]:
        """Show an identity with the attached pipelines while the context is open.

        The words take the place of the prompt's first class word ("person", "woman", ...); a
        prompt without one starts with them.

        Args:
            people: an identity, or one per prompt.
            scale: weight of the visual attention and of the LoRA; 0 disables the method, words
                included.
            start: fraction of the schedule after which it acts. The step that begins at `start`
                still has the text alone, unless start is 0.
            end: fraction of the schedule at which it stops acting; 1 includes the last step.
            num_words: 1 to 5 words in the prompt; the paper uses 1 in inference.
            fusion: further weights of the parts; training draws them.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: nothing is attached, an argument is out of range, or another identity is
                in use.
            IdentityError: an identity has other features.
        """
        if not 1 <= num_words <= NUM_LEVELS:
            raise OptionError(f"num_words must be between 1 and {NUM_LEVELS}; got {num_words}.")
        words, tokens = self.encode(list_identities(people))
        parts = fusion or Fusion()
        parts = replace(parts, visual=scale * parts.visual, lora=scale * parts.lora)
        register = partial(
            open_person, self.networks, list(words[:, :num_words]), tokens, parts, self.slot
        )
        with self.activate_span(register, scale, Span(start, end, after_start=True), pipe):
            yield self
