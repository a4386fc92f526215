"""Run jobs in several processes or on several machines with Ray (extra "cluster")."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from openpulid.bench.generate import Executor, Worker
from openpulid.bench.run_dir import Job
from openpulid.errors import OptionError, PulidError, first_line
from openpulid.ray_session import LOCAL, connect_ray


def check_workers(workers: str) -> None:
    """Raise OptionError if `workers` is neither a number from 1 nor the address of a cluster."""
    is_number = workers.isdecimal() and int(workers) > 0
    if not is_number and not workers.startswith("ray://"):
        raise OptionError(f"--workers {workers}: expected a number or ray://HOST:PORT.")


def ray_executor(build_worker: Callable[[], Worker], workers: str) -> Executor:
    """Return an executor that distributes jobs over actors with their own models.

    Args:
        build_worker: called once in each actor. All actors must see the same run directory.
        workers: number of local processes, or ray://HOST:PORT for a cluster with one actor per
            device.

    Raises:
        OptionError: Ray is not installed, or `workers` has another form.
    """
    check_workers(workers)
    is_local = workers.isdecimal()

    class WorkerActor:
        def __init__(self) -> None:
            self.worker = build_worker()

        def generate(self, job: Job) -> Job:
            self.worker.generate(job)
            return job

    def execute(jobs: Iterable[Job]) -> Iterable[Job]:
        address, count = (LOCAL, int(workers)) if is_local else (workers, None)
        with connect_ray(address, count, option="--workers"):
            yield from distribute(jobs)

    def distribute(jobs: Iterable[Job]) -> Iterable[Job]:
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool

        try:
            resources = ray.cluster_resources()
            num_gpus = int(resources.get("GPU", 0))
            num_actors = int(workers) if is_local else num_gpus or int(resources["CPU"])
            options: dict[str, Any] = {"num_cpus": 1}
            if num_gpus:  # actors share GPUs; otherwise Ray would never schedule the last ones
                options = {"num_gpus": 1 / math.ceil(num_actors / num_gpus)}
            actor = ray.remote(WorkerActor).options(**options)
            pool = ActorPool([actor.remote() for _ in range(num_actors)])
            yield from pool.map_unordered(lambda actor, job: actor.generate.remote(job), list(jobs))
        except RayTaskError as error:
            if isinstance(error.cause, PulidError):
                raise error.cause from None
            raise
        except RayError as error:
            reason = first_line(error)
            raise OptionError(
                f"a worker ended unexpectedly ({reason}); run the same command again, finished "
                "images are not generated again."
            ) from None

    return execute
