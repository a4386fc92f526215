"""DreamBooth (arXiv 2208.12242) with all weights: the U-Net of a file replaces that of the base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import Tensor

from openpulid.errors import OptionError
from openpulid.io.checkpoint_kinds import UNET_ALONE, CheckpointKind
from openpulid.io.checkpoints import read_optional_metadata, read_tensors
from openpulid.methods.adapter import check_projections_are_called, resident_weight
from openpulid.methods.hooks import PipelineState, find_unet
from openpulid.methods.tuned.base import ActiveCall, TunedAdapter, check_weights, find_parameter
from openpulid.methods.tuned.words import Trigger


class DreamBooth(TunedAdapter):
    """The weights of a U-Net that was tuned on one person.

    Args:
        weights: by the names of diffusers, all or some of the U-Net's.
        trigger: the word for the person; None if the file names none.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (UNET_ALONE,)

    def __init__(self, weights: Mapping[str, Tensor], trigger: Trigger | None = None) -> None:
        super().__init__(trigger)
        self.weights = dict(weights)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DreamBooth:
        """Load the weights of a U-Net with the names of diffusers.

        Raises:
            WeightsError: the file is missing, damaged, or no U-Net.
        """
        cls.check_file(path)
        return cls(read_tensors(path), Trigger.from_metadata(read_optional_metadata(path)))

    def save(self, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> None:
        """Write the weights in bfloat16 with the names of diffusers."""
        self._write(path, "dreambooth", self.weights, torch.bfloat16, metadata)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> DreamBooth:
        """Move the weights to a device and dtype."""
        self.weights = {name: x.to(device, dtype) for name, x in self.weights.items()}
        return self

    def check(self, target: Any) -> None:
        """Raise an error if the weights do not fit a pipeline's U-Net.

        Raises:
            OptionError: the target has no U-Net.
            WeightsError: the file belongs to another base model.
        """
        super().check(target)
        check_weights(find_unet(target), self.weights)

    def open_hooks(
        self, state: PipelineState, scale: float, call: ActiveCall, stack: ExitStack
    ) -> None:
        """Replace the weights until the stack closes; a scale other than 1 interpolates.

        Raises:
            OptionError: a start or end is set, or offloading would load the base's weights again.
        """
        if not call.span.covers_schedule:
            raise OptionError(
                "DreamBooth replaces the weights in all steps; leave out start and end."
            )
        check_projections_are_called(state.network)
        if _is_group_offload_enabled(state.network):
            raise OptionError(
                "DreamBooth replaces weights that group offloading loads again in every step; use "
                "another memory level."
            )
        for name, tensor in self.weights.items():
            parameter = resident_weight(find_parameter(state.network, name))
            stack.callback(setattr, parameter, "data", parameter.data)
            if scale != 1:  # float8 has no arithmetic
                base = parameter.data.float()
                tensor = torch.lerp(base, tensor.to(base), scale)
            parameter.data = tensor.to(parameter)
