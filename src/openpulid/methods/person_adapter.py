"""What methods share whose networks read an identity and act on a U-Net by hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.adapter import Adapter

NetworksT = TypeVar("NetworksT", bound=nn.Module)
Self = TypeVar("Self", bound="PersonAdapter[Any]")


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
