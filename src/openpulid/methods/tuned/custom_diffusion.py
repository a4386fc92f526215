"""Custom Diffusion (arXiv 2212.04488): keys and values of the cross-attention, and a word."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openpulid.errors import WeightsError
from openpulid.io.checkpoint_kinds import CUSTOM_DIFFUSION, CheckpointKind
from openpulid.io.checkpoints import (
    explain_bad_weights,
    read_optional_metadata,
    read_tensors,
)
from openpulid.methods.adapter import check_projections_are_called, resident_weight
from openpulid.methods.hooks import PipelineState, find_unet
from openpulid.methods.lora import delta_hook, shift_hook
from openpulid.methods.tuned.base import ActiveCall, TunedAdapter, check_weights, find_parameter
from openpulid.methods.tuned.words import ENCODERS, Trigger, encoder_words, read_words

_UNET = "unet."
_WORD = "modifier_token."
_FACTORS = (".u", ".v")


class CustomDiffusion(TunedAdapter):
    """Whole matrices `to_k` and `to_v` of the cross-attention, and the embeddings of a word.

    Args:
        matrices: name of the weight in the U-Net -> its value, (out, in) each.
        vectors: "clip_l" and "clip_g" -> (1, D); empty if no word was tuned.
        trigger: the word; None if the file names none.
        factors: name of a weight -> u (out, r) and v (r, in) of a compressed file; their product is
            added to the base's matrix.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (CUSTOM_DIFFUSION,)

    def __init__(
        self,
        matrices: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor] | None = None,
        trigger: Trigger | None = None,
        factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__(trigger)
        self.matrices = dict(matrices)
        self.vectors = dict(vectors or {})
        self.factors = dict(factors or {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CustomDiffusion:
        """Load a file of `pulid tune`, or the weights of the authors' `delta.bin`.

        The word of a `delta.bin` is not read: it has one new token of its own.

        Raises:
            WeightsError: the file is missing, damaged, or of another kind.
        """
        cls.check_file(path)
        tensors = read_tensors(path)
        matrices = {
            name.removeprefix(_UNET): x for name, x in tensors.items() if name.startswith(_UNET)
        }
        factors = {}
        for name in [name.removesuffix(".u") for name in matrices if name.endswith(".u")]:
            with explain_bad_weights(f"{path} is damaged, get it again"):
                u, v = (matrices.pop(name + part) for part in _FACTORS)
                assert u.ndim == v.ndim == 2 and u.shape[1] == len(v), f"{name} has no product"
            factors[name] = (u, v)
        vectors = {
            name: tensors[_WORD + name].reshape(1, -1)
            for name in ENCODERS
            if _WORD + name in tensors
        }
        if len(vectors) not in (0, len(ENCODERS)):
            raise WeightsError(f"{path} lacks the word of one text encoder; get it again.")
        trigger = Trigger.from_metadata(read_optional_metadata(path))
        return cls(matrices, vectors, trigger, factors)

    def save(self, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> None:
        """Write matrices and word in float16, with the authors' names."""
        tensors = {_UNET + name: x for name, x in self.matrices.items()}
        for name, pair in self.factors.items():
            tensors |= {_UNET + name + part: x for part, x in zip(_FACTORS, pair, strict=True)}
        tensors |= {_WORD + name: x[0] for name, x in self.vectors.items()}
        self._write(path, "custom-diffusion", tensors, torch.float16, metadata)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> CustomDiffusion:
        """Move matrices and word to a device and dtype."""
        self.matrices = {name: x.to(device, dtype) for name, x in self.matrices.items()}
        self.vectors = {name: x.to(device, dtype) for name, x in self.vectors.items()}
        self.factors = {
            name: (u.to(device, dtype), v.to(device, dtype))
            for name, (u, v) in self.factors.items()
        }
        return self

    def check(self, target: Any) -> None:
        """Raise an error if the file does not fit a pipeline.

        Raises:
            OptionError: the target has no U-Net, or its tokenizer has no such word.
            WeightsError: the file belongs to another base model.
        """
        super().check(target)
        shapes = {
            name: u.new_empty(len(u), v.shape[1], device="meta")
            for name, (u, v) in self.factors.items()
        }
        check_weights(find_unet(target), self.matrices | shapes)
        if self.vectors and self.trigger is not None:
            encoder_words(target, self.trigger.word, self.vectors)

    def open_hooks(
        self, state: PipelineState, scale: float, call: ActiveCall, stack: ExitStack
    ) -> None:
        """Register the hooks of keys and values, and those of the word."""
        check_projections_are_called(state.network)
        for name in (*self.matrices, *self.factors):
            weight = resident_weight(find_parameter(state.network, name))
            delta = (scale * self._difference(name, weight)).to(state.network.dtype)
            layer_name, _, kind = name.rpartition(".")
            layer = state.network.get_submodule(layer_name)
            hook = (shift_hook if kind == "bias" else delta_hook)(delta, call)
            stack.callback(layer.register_forward_hook(hook).remove)
        if self.vectors and self.trigger is not None:
            words = encoder_words(state.target, self.trigger.word, self.vectors)
            stack.enter_context(read_words(words))

    def _difference(self, name: str, weight: Tensor) -> Tensor:
        """Return the difference to the base's matrix (out, in), or bias, in float32."""
        if name in self.factors:
            u, v = (x.to(weight.device, torch.float32) for x in self.factors[name])
            return u @ v
        return self.matrices[name].to(weight.device, torch.float32) - weight.float()


def detach_first_token(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Stop the gradient of the begin token's key or value (forward hook of `to_k` and `to_v`).

    The authors do so in training: every prompt begins with that token.

    Args:
        module: the layer.
        args: its arguments.
        output: (B, T, D).
    """
    return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)
