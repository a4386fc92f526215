"""Begin an adapter for another transformer with the weights of one for FLUX.1."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from openpulid.errors import WeightsError
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.methods.transformer_kinds import BlockKey, find_transformer, select_block_keys

FLUX_BLOCKS = (19, 38)
"""Numbers of double and single blocks of FLUX.1."""


def transfer_adapter(adapter: PuLIDFlux, transformer: Any, **intervals: int) -> PuLIDFlux:
    """Create an adapter for another transformer of the same width from one for FLUX.1.

    The encoder is the same. The attention after a block begins with that after the block of FLUX.1
    of the same type at the nearest relative depth. Its output projection is zero, since it has
    learned to write into the features of FLUX.1: the new adapter changes nothing yet.

    Args:
        adapter: for FLUX.1.
        transformer: the other transformer.
        intervals: double_interval and single_interval; the kind's by default.

    Returns:
        The new adapter.

    Raises:
        OptionError: the transformer is of an unknown kind.
        WeightsError: the adapter is for another transformer than FLUX.1, or of another width.
    """
    transformer, kind = find_transformer(transformer)
    source = select_block_keys(*FLUX_BLOCKS, adapter.double_interval, adapter.single_interval)
    width = getattr(transformer, kind.width)
    if len(source) != len(adapter.layers) or adapter.layers[0].to_q.in_features != width:
        raise WeightsError(
            f"an adapter for {kind.name} can begin with one for FLUX.1 of width {width}: "
            f"{len(source)} layers; this one has {len(adapter.layers)} of width "
            f"{adapter.layers[0].to_q.in_features}."
        )
    intervals = kind.intervals() | intervals
    counts = kind.count_blocks(transformer)
    layers = nn.ModuleList()
    for key in select_block_keys(*counts, **intervals):
        nearest = min(
            (candidate for candidate in source if candidate[0] == key[0]),
            key=lambda candidate: abs(_depth(candidate, FLUX_BLOCKS) - _depth(key, counts)),
        )
        layer = deepcopy(adapter.layers[source.index(nearest)])
        nn.init.zeros_(layer.to_out.weight)
        layers.append(layer)
    result = PuLIDFlux(deepcopy(adapter.encoder), layers, **intervals)
    result.models = dict(adapter.models)
    return result.eval()


def _depth(key: BlockKey, counts: tuple[int, int]) -> float:
    """Return the position of a block among those of its type, from 0 to 1."""
    group, index = key
    return index / max(counts[group == "single"] - 1, 1)
