"""Face0 (arXiv 2306.06638), a re-implementation from the paper, in any SDXL pipeline.

There is no official code and there are no published weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from openpulid.errors import IdentityError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoint_kinds import FACE0, CheckpointKind
from openpulid.methods.face0.encoders import FaceMLP, check_networks, load_file
from openpulid.methods.face0.guidance import FaceGuidance, FaceTokens
from openpulid.methods.hooks import PipelineState, Span
from openpulid.methods.lora import LoraMatrices, move_lora
from openpulid.methods.person_adapter import PersonAdapter, list_identities


class Face0(PersonAdapter[FaceMLP]):
    """Three vectors of a face embedding overwrite the last three text tokens.

    The paper trains the whole U-Net. A file holds a LoRA of it, by any of diffusers' names.

    Args:
        networks: the MLP of a file.
        lora: the file's low-rank change of the U-Net.
    """

    slot: ClassVar[str] = "prompt"
    kinds: ClassVar[tuple[CheckpointKind, ...]] = (FACE0,)

    def __init__(self, networks: FaceMLP, lora: LoraMatrices | None = None) -> None:
        super().__init__(networks)
        self.lora = dict(lora or {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Face0:
        """Load a file with the parts `face_mlp` and `lora_weights`.

        Raises:
            WeightsError: The file does not exist, is damaged, or is another kind of adapter.
        """
        cls.check_file(path)
        return cls(*load_file(path))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Face0:
        """Move the MLP and the low-rank matrices to a device and dtype."""
        move_lora(self.lora, device, dtype)
        return super().to(device, dtype)

    def check(self, target: Any) -> None:
        """Raise an error if the adapter does not fit a pipeline or U-Net.

        Raises:
            OptionError: the target has no U-Net.
            WeightsError: the adapter was trained for another base model.
        """
        check_networks(target, self.networks, self.lora)

    def encode(self, people: Sequence[Identity]) -> Tensor:
        """Compute the tokens (P, 3, C) of identities; embeddings of several images are averaged.

        Raises:
            IdentityError: an identity has no embedding of this width.
        """
        width = self.networks.width
        embeddings = []
        for identity in people:
            if identity.id_cond.shape[-1] < width:
                raise IdentityError(
                    f"Face0 reads a face embedding of width {width}, which this identity does not "
                    "have; create it again from the reference images with "
                    "`pulid identify --method face0 --adapter FILE`."
                )
            embeddings.append(identity.id_cond[..., :width].mean(1))
        weight = next(self.networks.parameters())
        tokens: Tensor = self.networks(torch.cat(embeddings).to(weight))
        return tokens

    @contextmanager
    def use(
        self,
        people: Identity | Sequence[Identity],
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        guidance: FaceGuidance | None = None,
        pipe: Any = None,
    ) -> Iterator[Face0]:
        """Show an identity with the attached pipelines while the context is open.

        Args:
            people: an identity, or one per prompt.
            scale: share of the face in the overwritten tokens, and weight of the LoRA; the paper
                has 1. 0 disables the method.
            start: fraction of the schedule at which it begins to act.
            end: fraction of the schedule at which it stops acting; 1 includes the last step.
            guidance: how prompt and face are weighed. Other weights than the default's need one
                more call of the U-Net per step.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: nothing is attached, an argument is out of range, or another identity is
                in use.
            IdentityError: an identity has other features.
        """
        tokens = self.encode(list_identities(people))

        def register(state: PipelineState, span: Span) -> AbstractContextManager[None]:
            face = FaceTokens(state, tokens, scale, guidance or FaceGuidance(), span)
            return face.register(self.lora, self.slot)

        with self.activate_span(register, scale, Span(start, end), pipe):
            yield self
