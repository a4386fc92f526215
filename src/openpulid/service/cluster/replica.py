"""A replica: one device that generates the images of one preset."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from openpulid.device import select_device
from openpulid.errors import PulidError
from openpulid.identity.identity import Identity
from openpulid.pipelines.request import ModelSelection
from openpulid.service.cluster.batch_run import BatchRun
from openpulid.service.cluster.messages import Batch, Event, SentFiles, name_sources
from openpulid.service.jobs import Task
from openpulid.service.queue.engine import LocalEngine

INGRESS = "ingress"
"""Name of the deployment that has the queue."""

STATE_INTERVAL = 1.0
"""Seconds between two questions to the ingress about the tasks that run."""


class Replica:
    """Runs batches of one preset, one at a time.

    Torch runs in threads: on the event loop it would keep health checks and cancellations waiting.

    Args:
        models: the preset; requests can choose another method.
        device: where to compute; by default the device that Ray has assigned.
    """

    def __init__(self, models: ModelSelection, device: str | None = None) -> None:
        self._engine = LocalEngine(device)
        self._device = select_device(device)
        self._engine.studio(models)

    async def check_health(self) -> None:
        """Compute something: after some errors, a GPU is lost until its process ends.

        Raises:
            RuntimeError: the device does not compute; Ray replaces the replica.
        """
        await asyncio.to_thread(lambda: torch.ones(1, device=self._device).sum().item())

    async def load(self) -> None:
        """Load the models of this call."""
        await self._load_models(serve.get_multiplexed_model_id())

    async def identify(
        self, images: Sequence[str], files: SentFiles, face_index: int | None, face_order: str
    ) -> Identity | PulidError:
        """Extract the identity of one person, see `Studio.identify`.

        Args:
            images: paths of reference images, on the machine of the caller.
            files: these images.
            face_index: see `Studio.identify`.
            face_order: see `Studio.identify`.

        Returns:
            The identity, or why there is none.
        """
        models = ModelSelection.model_validate_json(serve.get_multiplexed_model_id())

        def work() -> Identity | PulidError:
            with files.write() as paths:
                local = [Path(paths[image]) for image in images]
                try:
                    return self._engine.identify(models, local, face_index, face_order)
                except PulidError as error:
                    return name_sources(error, paths)

        with suppress(PulidError):  # `identify` raises it again
            await self.load()
        return await asyncio.to_thread(work)

    async def run(self, batch: Batch) -> AsyncIterator[Event]:
        """Generate the images of a batch. A cancelled call stops after the present step."""
        with suppress(PulidError):  # each task gets it as its result
            await self.load()
        run = BatchRun(self._engine, batch, asyncio.get_running_loop())
        work = asyncio.ensure_future(asyncio.to_thread(run.work))
        observation = asyncio.ensure_future(self._observe(run, batch.tasks))
        try:
            while (event := await run.events.get()) is not None:
                yield event
            await work
        finally:
            observation.cancel()
            run.stop()
            await asyncio.wait([work])

    @serve.multiplexed(max_num_models_per_replica=1)
    async def _load_models(self, models: str) -> ModelSelection:
        """Load models; Ray prefers to send their batches to the replicas that have them.

        Args:
            models: a `ModelSelection` as JSON.
        """
        selection = ModelSelection.model_validate_json(models)
        await asyncio.to_thread(self._engine.studio, selection)
        return selection

    @cached_property
    def _ingress(self) -> DeploymentHandle:
        return serve.get_deployment_handle(INGRESS, serve.get_replica_context().app_name)

    async def _observe(self, run: BatchRun, tasks: Sequence[Task]) -> None:
        """Ask the queue about the tasks that run.

        It knows who watches, and which tasks are cancelled or run elsewhere since the ingress that
        has sent them has ended.
        """
        while True:
            await asyncio.sleep(STATE_INTERVAL)
            with suppress(RayError, RayServeException):  # the ingress may just start again
                run.update(await self._ingress.list_states.remote(tasks))
