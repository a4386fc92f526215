"""The engine of the ingress: it sends batches to replicas, and receives what they report."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from openpulid.errors import PulidError
from openpulid.identity.identity import Identity
from openpulid.pipelines.request import ModelSelection
from openpulid.service.cluster.messages import Batch, Event, ResultEvent, SentFiles, StepEvent
from openpulid.service.jobs import Task
from openpulid.service.queue.engine import Interrupted, OnStep, Result
from openpulid.service.store.records import MISSING_INPUT, list_inputs

logger = logging.getLogger(__name__)

WAIT = 0.5
"""Seconds between two looks at whether a batch is to be stopped, while nothing happens."""

PAUSE = 1.0
"""Seconds until the tasks of a replica that has ended go back into the queue."""

IDENTIFY_ATTEMPTS = 3


class RayEngine:
    """Generates images on replicas, an `Engine`. Threads share it.

    Each call waits until a replica of the preset is free.

    Args:
        replicas: name of a preset -> its replicas.
    """

    def __init__(self, replicas: Mapping[str, DeploymentHandle]) -> None:
        self._replicas = replicas

    def load(self, models: ModelSelection) -> None:
        """Wait until a replica has loaded these models.

        Raises:
            PulidError: they cannot be loaded.
        """
        self._choose(models).load.remote().result()

    def identify(
        self,
        models: ModelSelection,
        images: Sequence[Path],
        face_index: int | None = None,
        face_order: str = "large-small",
    ) -> Identity:
        """Extract the identity of one person, see `Studio.identify`."""
        replicas = self._choose(models)
        files = SentFiles({str(image): image.read_bytes() for image in images})
        for attempt in range(1, IDENTIFY_ATTEMPTS + 1):
            call = replicas.identify.remote(list(map(str, images)), files, face_index, face_order)
            try:
                identity: Identity | PulidError = call.result()
            except (RayError, RayServeException) as error:
                logger.warning("a replica has ended: %s", error)
                if attempt == IDENTIFY_ATTEMPTS:
                    raise
            else:
                break
        if isinstance(identity, PulidError):
            raise identity
        return identity

    def run(self, tasks: Sequence[Task], on_step: OnStep) -> Iterator[tuple[Task, Result]]:
        """Generate the images of tasks of equal batch key, see `Engine.run`.

        Raises:
            Interrupted: the replica has ended.
        """
        contents: dict[str, bytes] = {}
        ready = []
        for task in tasks:
            try:
                contents.update(_read_inputs(task))
            except OSError:  # such as those of a job that has just been cancelled
                yield task, PulidError(MISSING_INPUT)
            else:
                ready.append(task)
        if ready:
            yield from self._run(Batch(tuple(ready), SentFiles(contents)), on_step)

    def _run(self, batch: Batch, on_step: OnStep) -> Iterator[tuple[Task, Result]]:
        replicas = self._choose(batch.tasks[0].request.model or ModelSelection())
        call = replicas.options(stream=True).run.remote(batch)
        previews: dict[int, Image.Image] = {}
        open_positions = set(range(len(batch.tasks)))
        last = StepEvent(sorted(open_positions), 0, 0)
        try:
            for event in _poll(call):
                if isinstance(event, ResultEvent):
                    open_positions.discard(event.position)
                    last = StepEvent(sorted(open_positions), 0, 0)
                    yield batch.tasks[event.position], event.result
                    continue
                # while nothing happens, the last step is reported again: `on_step` may stop it
                last = event or last
                previews.update(last.previews)
                running = [batch.tasks[position] for position in last.positions]
                preview = partial(_find_preview, previews, last.positions)
                if running:
                    on_step(running, last.step, last.total, preview)
        except (RayError, RayServeException) as error:
            logger.warning("a replica has ended: %s", error)
            time.sleep(PAUSE)
            raise Interrupted from error
        finally:
            call.cancel()

    def _choose(self, models: ModelSelection) -> Any:
        """Return the replicas of a preset; Ray prefers those that have the method in memory."""
        replicas = self._replicas[models.preset]
        return replicas.options(multiplexed_model_id=models.model_dump_json(exclude_none=True))


def _read_inputs(task: Task) -> dict[str, bytes]:
    return {path: Path(path).read_bytes() for _, path in list_inputs(task.request)}


def _find_preview(
    previews: Mapping[int, Image.Image], positions: Sequence[int], row: int
) -> Image.Image:
    if positions[row] not in previews:
        raise IndexError(f"there is no preview of image {row} yet.")
    return previews[positions[row]]


def _poll(call: DeploymentResponseGenerator) -> Iterator[Event | None]:
    """Yield the events of a call, and None again and again while there is none.

    A call can only be waited for without an end, so a thread does that.
    """
    events: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()

    def receive() -> None:
        try:
            for event in call:
                events.put(event)
            events.put(None)
        except Exception as error:
            events.put(error)

    threading.Thread(target=receive, name="replica events", daemon=True).start()
    while True:
        try:
            event = events.get(timeout=WAIT)
        except queue.Empty:
            yield None
            continue
        if event is None:
            return
        if isinstance(event, Exception):
            raise event
        yield event
