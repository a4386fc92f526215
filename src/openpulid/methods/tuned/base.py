"""What the tuned methods share: the person is in the file, and the prompt names it by a word."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.io.checkpoints import explain_bad_weights, save_tensors
from openpulid.methods.adapter import Adapter, exclusive_use
from openpulid.methods.hooks import (
    HookResult,
    PipelineState,
    Span,
    UNetCall,
    find_unet,
)
from openpulid.methods.tuned.words import Trigger


class TunedAdapter(Adapter):
    """A method that was tuned on images of one person; no reference image is needed.

    Args:
        trigger: the word for the person; None if the file names none.
    """

    slot: ClassVar[str] = "tuned"

    def __init__(self, trigger: Trigger | None = None) -> None:
        super().__init__()
        self.trigger = trigger

    def insert_trigger(self, prompt: str) -> str:
        """Return a prompt that names the person, see `Trigger.insert`."""
        return prompt if self.trigger is None else self.trigger.insert(prompt)

    def save(self, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> None:
        """Write the file that `load` reads, and other programs where there is a common format.

        Args:
            path: the file.
            metadata: further entries, such as the facts of the training.
        """
        raise NotImplementedError

    def _write(
        self,
        path: str | os.PathLike[str],
        method: str,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        metadata: Mapping[str, Any] | None,
    ) -> None:
        """Write a file whose metadata name the method and the trigger.

        Args:
            path: the file.
            method: name of the method.
            tensors: by their names in the file.
            dtype: dtype in which they are stored.
            metadata: further entries.
        """
        stored = {name: x.detach().to("cpu", dtype).contiguous() for name, x in tensors.items()}
        entries = {"method": method} | (self.trigger.metadata() if self.trigger else {})
        entries |= {name: str(value) for name, value in (metadata or {}).items()}
        save_tensors(stored, path, entries)

    def open_hooks(
        self, state: PipelineState, scale: float, call: ActiveCall, stack: ExitStack
    ) -> None:
        """Register the hooks on one pipeline.

        Args:
            state: of the pipeline.
            scale: weight of the method.
            call: whether the current call of the U-Net is in the span of the schedule.
            stack: closes the hooks.
        """
        raise NotImplementedError

    def check(self, target: Any) -> None:
        """Raise OptionError if the target has no U-Net."""
        find_unet(target)

    @contextmanager
    def use(
        self,
        people: None = None,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[TunedAdapter]:
        """Show the person of the file with the attached pipelines while the context is open.

        The prompt must name the person, see `insert_trigger`.

        Args:
            people: None; the file has one person.
            scale: weight of the method; 0 disables it.
            start: fraction of the schedule at which it begins to act on the U-Net.
            end: fraction at which it stops; 1 includes the last step.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: an identity is passed, nothing is attached, or an argument is out of range.
        """
        if people is not None:
            raise OptionError(
                f"{type(self).__name__} shows the person it was tuned on; leave the identity out."
            )
        with self.activate_span(
            lambda state, span: self._open(state, scale, span),
            scale,
            Span(start, end),
            pipe,
            "the method",
        ):
            yield self

    @contextmanager
    def _open(self, state: PipelineState, scale: float, span: Span) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(exclusive_use(state.network, self.slot, state.network.modules()))
            call = ActiveCall(state, span)
            if not span.covers_schedule:
                handle = state.network.register_forward_pre_hook(call.update, with_kwargs=True)
                stack.callback(handle.remove)
            self.open_hooks(state, scale, call, stack)
            yield


class ActiveCall:
    """Whether the current call of a U-Net is in a span of the schedule."""

    def __init__(self, state: PipelineState, span: Span) -> None:
        self.state = state
        self.span = span
        self.is_active = True

    def update(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HookResult | None:
        """Look up the position of a call (forward pre-hook of the U-Net)."""
        call = UNetCall.parse(args, kwargs)
        self.is_active = self.span.contains(self.state.position(call.timestep))
        return None

    def __call__(self) -> bool:
        """Return whether the method acts in the current call."""
        return self.is_active


def check_weights(unet: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Check that whole weights belong to a U-Net.

    Raises:
        WeightsError: one has another name or shape.
    """
    for name, tensor in weights.items():
        if find_parameter(unet, name).shape != tensor.shape:
            raise WeightsError(
                "these weights belong to another base model; use the base model on which they were "
                "tuned."
            )


def find_parameter(unet: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter of a U-Net, also of a layer that peft has wrapped for a user's LoRA.

    Raises:
        WeightsError: there is none of this name.
    """
    module, _, attribute = name.rpartition(".")
    with explain_bad_weights("these weights belong to another base model"):
        layer = unet.get_submodule(module)
        parameter = getattr(getattr(layer, "base_layer", layer), attribute)
        assert isinstance(parameter, nn.Parameter), f"{name} is no weight"
    return parameter
