"""A run's chunks over several processes or machines, by Ray (extra "cluster")."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from openpulid.bench.generate import Executor, Worker
from openpulid.bench.run_dir import Job
from openpulid.errors import OptionError


def ray_executor(build: Callable[[], Worker], workers: str) -> Executor:
    """Chunks over actors that each hold their own models.

    Args:
        build: makes a worker's contest; called once in each. The run's folder must be the same for all.
        workers: how many on this machine, or ray://HOST:PORT, a cluster, with an actor for each of its devices.

    Raises:
        OptionError: Ray is not installed, or `workers` is neither.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise OptionError("--workers needs Ray: pip install 'openpulid[cluster]'.") from None
    if not (workers.startswith("ray://") or (workers.isdigit() and int(workers))):
        raise OptionError(f"--workers {workers}: say how many, or ray://HOST:PORT.")

    class Worker:
        def __init__(self) -> None:
            self.contest = build()

        def make(self, chunk: Job) -> Job:
            self.contest.make(chunk)
            return chunk

    def spread(chunks: Iterable[Job]) -> Iterable[Job]:
        here = workers.isdigit()
        if here:
            ray.init(
                num_cpus=int(workers),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
        else:
            ray.init(workers)
        try:
            resources = ray.cluster_resources()
            count = int(workers) if here else int(resources.get("GPU") or resources["CPU"])
            gpus = int(
                resources.get("GPU", 0)
            )  # several workers share one, or the last would wait for ever
            options: dict[str, Any] = (
                {"num_gpus": 1 / math.ceil(count / gpus)} if gpus else {"num_cpus": 1}
            )
            pool = ActorPool([ray.remote(Worker).options(**options).remote() for _ in range(count)])
            yield from pool.map_unordered(
                lambda actor, chunk: actor.make.remote(chunk), list(chunks)
            )
        finally:
            ray.shutdown()

    return spread
