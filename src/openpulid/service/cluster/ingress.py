"""The ingress: the HTTP API, the queue, and the workers that send batches to the replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from openpulid.service.api.access import ApiKeys
from openpulid.service.api.app import create_app
from openpulid.service.api.backend import Backend
from openpulid.service.catalog import Catalog
from openpulid.service.cluster.engine import RayEngine
from openpulid.service.cluster.workers import Workers
from openpulid.service.config import ServiceConfig
from openpulid.service.jobs import Task
from openpulid.service.server import load_in_background, open_stores
from openpulid.service.store.jobs import TaskState


class Ingress:
    """Accepts jobs, and lets the replicas run them.

    A worker sends one batch at a time. Each preset has as many workers as it can have replicas, so
    Ray sees how many replicas are needed, and no batch is claimed that could not run at once.

    Args:
        config: of the service.
        api_keys: file of the API keys, if they are required.
        replicas: name of a preset -> its replicas.
        num_workers: name of a preset -> the most batches that run at once.

    Raises:
        OptionError: the file of the API keys cannot be read, or there is no such preset.
        WeightsError: weights are not installed.
        StoreError: the database or the folder cannot be used.
    """

    def __init__(
        self,
        config: ServiceConfig,
        api_keys: Path | None,
        replicas: Mapping[str, DeploymentHandle],
        num_workers: Mapping[str, int],
    ) -> None:
        self._config = config
        self._keys = None if api_keys is None else ApiKeys.read(api_keys)
        self._num_workers = num_workers
        self._engine = RayEngine(replicas)
        self._catalog = Catalog(config.models)
        self._stack = ExitStack()
        self._jobs, self._identities = self._stack.enter_context(open_stores(config))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Start the workers, and create the application (called by Ray)."""
        workers = Workers(self._jobs, self._engine, self._config.max_batch)
        self._stack.callback(workers.stop)
        workers.start(self._num_workers)
        models = self._catalog.find().preset.selection
        backend = Backend(
            config=self._config,
            catalog=self._catalog,
            jobs=self._jobs,
            identities=self._identities,
            engine=self._engine,
            is_ready=load_in_background(lambda: self._engine.load(models)),
            wake=workers.wake,
        )
        return create_app(backend, self._keys)

    async def list_states(self, tasks: Sequence[Task]) -> list[TaskState]:
        """Return what a replica must know about tasks that it runs."""
        return await asyncio.to_thread(self._jobs.list_states, tasks)

    def __del__(self) -> None:
        """Stop the workers; what they run goes back into the queue (called by Ray)."""
        self._stack.close()
