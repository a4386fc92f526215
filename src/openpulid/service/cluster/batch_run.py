"""One batch on a replica: from a thread that generates images to the replica's event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from PIL import Image

from openpulid.errors import PulidError, Stopped
from openpulid.service.cluster.messages import Batch, Event, ResultEvent, StepEvent, name_sources
from openpulid.service.jobs import Task
from openpulid.service.queue.dispatcher import PREVIEW_INTERVAL, STEP_INTERVAL
from openpulid.service.queue.engine import LocalEngine
from openpulid.service.store.jobs import TaskState


class BatchRun:
    """A batch that runs in a thread, and what it reports to the event loop.

    Args:
        engine: of the replica.
        batch: the batch.
        loop: the event loop of the replica.

    Attributes:
        events: what has happened; None after the end.
    """

    def __init__(self, engine: LocalEngine, batch: Batch, loop: asyncio.AbstractEventLoop) -> None:
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._engine = engine
        self._batch = batch
        self._loop = loop
        self._positions = {_key_of(task): number for number, task in enumerate(batch.tasks)}
        self._watched: frozenset[int] = frozenset()
        self._is_stopped = threading.Event()
        self._last_step = -STEP_INTERVAL
        self._last_preview = -PREVIEW_INTERVAL

    def work(self) -> None:
        """Run the batch (in a thread)."""
        try:
            with self._batch.files.write() as paths:
                tasks = self._batch.localize(paths)
                for task, result in self._engine.run(tasks, self._on_step):
                    if isinstance(result, PulidError):
                        result = name_sources(result, paths)
                    self._send(ResultEvent(self._position(task), result))
        except Stopped:
            pass
        finally:
            self._send(None)

    def stop(self) -> None:
        """Stop after the present step."""
        self._is_stopped.set()

    def update(self, states: Sequence[TaskState]) -> None:
        """Note what the queue knows about the tasks; stop if nobody waits for them."""
        self._watched = frozenset(k for k, state in enumerate(states) if state.is_watched)
        if all(state.is_lost for state in states):
            self.stop()

    def _on_step(
        self, tasks: Sequence[Task], step: int, total: int, preview: Callable[[int], Image.Image]
    ) -> None:
        if self._is_stopped.is_set():
            raise Stopped
        now = time.monotonic()
        previews = {}
        positions = [self._position(task) for task in tasks]
        if self._watched and now - self._last_preview >= PREVIEW_INTERVAL:
            self._last_preview = now
            for row, position in enumerate(positions):
                if position in self._watched:
                    with suppress(IndexError):  # the image is not computed in this step
                        previews[position] = preview(row)
        if previews or step == total or now - self._last_step >= STEP_INTERVAL:
            self._last_step = now
            self._send(StepEvent(positions, step, total, previews))

    def _position(self, task: Task) -> int:
        return self._positions[_key_of(task)]

    def _send(self, event: Event | None) -> None:
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)


def _key_of(task: Task) -> tuple[str, int]:
    """Return what tells a task from others in its batch."""
    return task.job_id, task.index
