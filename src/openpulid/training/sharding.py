"""Frozen base models that the processes of a run share, so that none keeps all of the weights.

Each process keeps its share of every block. A block is gathered while it computes and released
afterwards (FSDP2, torch.distributed.fsdp). The adapter is small and stays whole in every process,
so checkpoints do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from openpulid.errors import OptionError
from openpulid.training.distributed import DistributedContext, count_processes
from openpulid.training.rng import check_shared


def check_several(num_processes: int) -> None:
    """Raise OptionError if there is only one process, which can share nothing."""
    if num_processes == 1:
        raise OptionError(
            "a base model can only be sharded over several processes: start the training with "
            "accelerate launch or torchrun, or leave out --shard."
        )


def check_processes(batches: Mapping[str, int], accumulate: int, *, is_sharded: bool) -> None:
    """Check that the processes of a run can share its batches, before anything is loaded.

    Args:
        batches: name -> global batch size.
        accumulate: micro-batches per step.
        is_sharded: whether the processes share the frozen networks.

    Raises:
        OptionError: they cannot share a batch, or there is a single process that shards.
    """
    num_processes = count_processes()
    if is_sharded:
        check_several(num_processes)
    for name, size in batches.items():
        check_shared(size, num_processes * accumulate, name)


def shard_network(network: Any, blocks: Iterable[nn.Module]) -> None:
    """Share a frozen network among the processes of the run.

    All processes must then call it equally often, also in validation.

    Args:
        network: with the same weights in every process.
        blocks: its parts that are gathered one at a time.

    Raises:
        OptionError: there is only one process.
    """
    ranks = DistributedContext(network.device)
    check_several(ranks.world_size)
    mesh = init_device_mesh(network.device.type, (ranks.world_size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
