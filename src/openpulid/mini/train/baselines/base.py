"""Base class of the baselines in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from openpulid.identity.identity import Identity
from openpulid.training import StepRNG
from openpulid.training.pulid import Batch, DiffusionStep, drop_identity
from openpulid.training.pulid.models import AttentionQK

Features = Literal["embedding", "images", "levels", "latents"]
"""What a baseline reads of a person: the face embedding, the reference image itself, five levels of
the vision encoder, or face latents."""

Attention = Sequence[AttentionQK]
"""Queries and keys of each cross-attention layer."""


class Baseline:
    """A method in training.

    Attributes:
        method: attached by `BaselineTask`.
        trained: all modules that train and begin with random weights.
        pretrained: a module that trains with a smaller learning rate, so that it keeps what it has
            learned before; None without one.
        needs_identity: whether identities are never dropped in training.
        masks_loss: whether half of the steps restrict the loss to the face.
        trains_text: whether the method trains through the text encoders.
        reads_attention: whether `extra_losses` reads the cross-attention.
    """

    needs_identity: ClassVar[bool] = False
    masks_loss: ClassVar[bool] = False
    trains_text: ClassVar[bool] = False
    reads_attention: ClassVar[bool] = False

    def __init__(
        self, method: Any, trained: nn.Module, pretrained: nn.Module | None = None
    ) -> None:
        self.method = method
        self.trained = trained
        self.pretrained = pretrained

    def identities(self, batch: Batch) -> list[Identity]:
        """Return the identities of a batch in the method's format."""
        assert batch.landmarks is not None
        return [
            Identity(
                batch.id_cond[row, None, None],
                tuple(level[row, None] for level in batch.hidden),
                landmarks=batch.landmarks[row, None, None],
            )
            for row in range(len(batch.id_cond))
        ]

    def use(
        self, batch: Batch, pipe: Any, rng: StepRNG | None = None
    ) -> AbstractContextManager[Any]:
        """Open the method with the identities of a batch.

        Args:
            batch: dropped identities are all zero.
            pipe: the attached pipeline.
            rng: of a training step; None in a validation.
        """
        return self.method.use(self.identities(batch), scale=1.0, start=0.0, pipe=pipe)

    def drop(self, batch: Batch, dropped: Tensor, rng: StepRNG) -> Batch:
        """Drop the identities of a training batch where `dropped` (B,) is true."""
        return drop_identity(batch, dropped)

    def masked_loss(self, step: DiffusionStep, batch: Batch) -> Tensor | None:
        """Compute the loss of the face alone, a scalar; None for that of `BaselineTask`."""
        return None

    def extra_losses(self, batch: Batch, pipe: Any, attention: Attention) -> Mapping[str, Tensor]:
        """Compute the weighted losses of a training step besides L_diff, by name.

        Args:
            batch: as in `use`.
            pipe: the attached pipeline.
            attention: of each cross-attention layer, if the baseline reads it.
        """
        return {}

    def comparisons(self, batch: Batch, rng: StepRNG) -> Sequence[Batch | None]:
        """Return batches whose predictions a step's losses compare with; None has no identity.

        They are of the same noised images, and carry no gradient.

        Args:
            batch: as in `use`.
            rng: of the training step.
        """
        return ()

    def comparison_losses(
        self, step: DiffusionStep, others: Sequence[DiffusionStep], batch: Batch
    ) -> Mapping[str, Tensor]:
        """Compute the weighted losses that compare predictions, by name.

        Args:
            step: the prediction of a training step.
            others: those of `comparisons`.
            batch: as in `use`.
        """
        return {}

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the method in its published layout, in half precision.

        Returns:
            The file or folder; a file's suffix is added to `path`.
        """
        raise NotImplementedError


def draw_uniform(rng: StepRNG, name: str) -> float:
    """Draw a number from 0 to 1 for a whole step."""
    return float(torch.rand((), generator=rng.generator(name)))
