"""Networks that map levels of a vision encoder to vectors, for ELITE, PhotoVerse and PuLID.

Shapes: n reference images, N patches, S width of the vision encoder, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openpulid.errors import IdentityError
from openpulid.identity.identity import Identity

NUM_LEVELS = 5
"""Hidden levels of the vision encoder that ELITE, PhotoVerse and PuLID read."""


def mlp(width_in: int, first: int, second: int, width_out: int) -> nn.Sequential:
    """Build three linear layers with LayerNorm and LeakyReLU in between."""
    return nn.Sequential(
        nn.Linear(width_in, first),
        nn.LayerNorm(first),
        nn.LeakyReLU(),
        nn.Linear(first, second),
        nn.LayerNorm(second),
        nn.LeakyReLU(),
        nn.Linear(second, width_out),
    )


class LevelMapper(nn.Module):
    """Five levels of a vision encoder -> five vectors.

    Each level has two networks: one for the class token, and one whose outputs are averaged over
    the patches (ELITE, arXiv 2302.13848, section 3.1). The names are those of ELITE's files.

    Args:
        states_dim: S.
        inner_dim: width between the layers of a network.
        width: D.
    """

    def __init__(self, states_dim: int, inner_dim: int, width: int) -> None:
        super().__init__()
        self.states_dim = states_dim
        self.width = width
        for level in range(NUM_LEVELS):
            for name in ("mapping", "mapping_patch"):
                self.add_module(f"{name}_{level}", mlp(states_dim, inner_dim, inner_dim, width))

    def words(self, levels: Sequence[Tensor]) -> Tensor:
        """Map five levels (n, 1 + N, S) to one vector each, (n, 5, D)."""
        pairs = [self.map_level(level, states) for level, states in enumerate(levels)]
        return torch.cat([token + patches.mean(1, keepdim=True) for token, patches in pairs], 1)

    def map_level(self, level: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Map the class token and the patches of a level; returns (n, 1, D) and (n, N, D)."""
        token = self.get_submodule(f"mapping_{level}")(states[:, :1])
        return token, self.get_submodule(f"mapping_patch_{level}")(states[:, 1:])


def read_levels(
    people: Sequence[Identity], states_dim: int, method: str, like: Tensor
) -> list[Tensor]:
    """Return the five levels (n, 1 + N, S) of all images, the last level of the encoder first.

    Args:
        people: have them in the order of the encoder's layers.
        states_dim: S.
        method: name of the method, for messages.
        like: has the device and dtype of the result.

    Raises:
        IdentityError: an identity has other features.
    """
    for identity in people:
        if len(identity.hidden) != NUM_LEVELS or identity.hidden[0].shape[-1] != states_dim:
            raise IdentityError(
                f"{method} reads five levels of a vision encoder of width {states_dim}, which this "
                "identity does not have; create it again from the reference images with "
                f"`pulid identify --method {method.lower()} --adapter FILE`."
            )
    levels = [
        torch.cat([x.hidden[level][0].to(like).unflatten(0, (x.photos, -1)) for x in people])
        for level in range(NUM_LEVELS)
    ]
    return last_first(levels)


def last_first(levels: Sequence[Tensor]) -> list[Tensor]:
    """Sort levels as the mappers read them: the last one, then the others in their order."""
    return [levels[-1], *levels[:-1]]
