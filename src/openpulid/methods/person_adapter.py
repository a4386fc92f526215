"""What methods share whose networks read an identity and act on a U-Net by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.adapter import Adapter
from openpulid.methods.hooks import PipelineState, Span, check_scale

NetworksT = TypeVar("NetworksT", bound=nn.Module)
Self = TypeVar("Self", bound="PersonAdapter[Any]")

OpenPipeline = Callable[[PipelineState, Span], AbstractContextManager[Any]]
"""Registers the hooks on one pipeline."""


class PersonAdapter(Adapter, Generic[NetworksT]):
    """A method that consists of one module.

    Args:
        networks: all weights, under the names of a file.
    """

    def __init__(self, networks: NetworksT) -> None:
        super().__init__()
        self.networks = networks

    def to(self: Self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move the networks to a device and dtype."""
        self.networks.to(device, dtype)
        return self

    @contextmanager
    def activate_span(
        self, open_pipeline: OpenPipeline, scale: float, span: Span, pipe: Any
    ) -> Iterator[None]:
        """Open the attached pipelines, unless the method would change nothing.

        Args:
            open_pipeline: registers the hooks on one pipeline.
            scale: weight of the method; 0 disables it.
            span: of the schedule in which it acts.
            pipe: one of the attached pipelines; None for all of them.

        Raises:
            OptionError: nothing is attached, or the scale is out of range.
        """
        check_scale(scale)
        states = self.select_pipelines(pipe)
        with span.watch("the identity") as watched:
            if not scale or span.is_empty:
                yield
                return
            with self.activate(states, lambda state: open_pipeline(state, watched)):
                yield


def list_identities(people: Identity | Sequence[Identity]) -> list[Identity]:
    """Return one identity for all prompts, or one per prompt, as a list.

    Raises:
        OptionError: there is none.
        IdentityError: the features of one are not finite.
    """
    identities = [people] if isinstance(people, Identity) else list(people)
    if not identities or not all(isinstance(identity, Identity) for identity in identities):
        raise OptionError("pass an identity, or one per prompt.")
    for identity in identities:
        identity.check_values()
    return identities
