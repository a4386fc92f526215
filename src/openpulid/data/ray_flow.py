"""Run an operator over batches with Ray Data, on this machine or on a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openpulid.errors import PulidError, first_line

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Operator:
    """What is done with each batch.

    Attributes:
        stage: a class whose instances map a table to a table.
        arguments: of the class.
        has_models: whether it runs networks, on a GPU if there is one.
    """

    stage: Callable[..., Any]
    arguments: tuple[Any, ...]
    has_models: bool = False


def run_flow(tables: Sequence[pyarrow.Table], operator: Operator) -> Iterator[pyarrow.Table]:
    """Pass tables through an operator, and yield its tables as they become ready, in any order.

    Each processor has a worker; with GPUs, each GPU has one, and the processors are shared among
    them. A batch whose worker is killed is repeated by another worker.

    Args:
        tables: one per batch.
        operator: what is done with them.

    Raises:
        PulidError: the operator raised it, or the cluster was lost.
    """
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError, RayTaskError

    if not tables:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources = ray.cluster_resources()
    cpus, gpus = max(int(resources.get("CPU", 1)), 1), int(resources.get("GPU", 0))
    size, options = cpus, {"num_cpus": 1}
    if operator.has_models and gpus:
        size, options = gpus, {"num_gpus": 1, "num_cpus": max(cpus // gpus, 1)}

    flow = ray.data.from_arrow(list(tables)).map_batches(
        operator.stage,
        fn_constructor_args=operator.arguments,
        batch_size=None,
        batch_format="pyarrow",
        # Each worker has one batch at a time, and no more to lose. To a pool that grows by itself
        # such workers look idle.
        compute=ActorPoolStrategy(size=min(size, len(tables)), max_tasks_in_flight_per_actor=1),
        **options,
    )
    try:
        yield from flow.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        if isinstance(error.cause, PulidError):
            raise error.cause from None
        raise
    except RayError as error:
        reason = first_line(error)
        raise PulidError(
            f"a worker ended unexpectedly ({reason}); run the same command again, finished batches "
            "are not repeated."
        ) from None
