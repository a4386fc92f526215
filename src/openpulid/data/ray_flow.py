"""Run operators over batches with Ray Data, on this machine or on a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openpulid.errors import PulidError

if TYPE_CHECKING:
    import pyarrow

CPUS_OF_LIGHT = 0.25
"""Of an operator whose work is small next to that of the face models."""
CPUS_OF_MODEL = 0.5


@dataclass(frozen=True)
class Operator:
    """One step of a flow.

    Attributes:
        stage: a class whose instances map a table to a table.
        arguments: of the class.
        has_models: whether it runs networks, on a GPU if there is one.
    """

    stage: Callable[..., Any]
    arguments: tuple[Any, ...]
    has_models: bool = False


def run_flow(
    tables: Sequence[pyarrow.Table], operators: Sequence[Operator]
) -> Iterator[pyarrow.Table]:
    """Pass tables through operators, and yield the last one's as they become ready, in any order.

    A batch whose worker is killed is repeated by another worker.

    Args:
        tables: one per batch.
        operators: in order.

    Raises:
        PulidError: an operator raised it, or the cluster was lost.
    """
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError, RayTaskError

    if not tables:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = -1
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources = ray.cluster_resources()
    cpus, gpus = max(int(resources.get("CPU", 1)), 1), int(resources.get("GPU", 0))

    flow = ray.data.from_arrow(list(tables))
    for operator in operators:
        options: dict[str, Any] = {"num_cpus": CPUS_OF_LIGHT}
        size = min(cpus, len(tables))
        if operator.has_models:
            options = {"num_gpus": 1} if gpus else {"num_cpus": CPUS_OF_MODEL}
            size = min(gpus or cpus, len(tables))
        flow = flow.map_batches(
            operator.stage,
            fn_constructor_args=operator.arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=size),
            **options,
        )
    try:
        yield from flow.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        if isinstance(error.cause, PulidError):
            raise error.cause from None
        raise
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise PulidError(
            f"a worker ended unexpectedly ({reason}); run the same command again, finished batches "
            "are not repeated."
        ) from None
