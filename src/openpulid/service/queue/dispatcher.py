"""Claim batches, run them on an engine, and publish their images."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from itertools import count

from PIL import Image

from openpulid.errors import PulidError, Stopped, StoreError
from openpulid.io.metadata import encode_image
from openpulid.service.jobs import Task
from openpulid.service.queue.engine import UNEXPECTED, Engine, Interrupted, Result
from openpulid.service.queue.periodic import Periodic
from openpulid.service.store.jobs import JobStore

logger = logging.getLogger(__name__)

LEASE = 60.0
"""Seconds after which the tasks of a worker that has ended go to another."""

POLL = 0.5
"""Seconds between two looks at an empty queue; `Dispatcher.wake` is faster."""

STEP_INTERVAL = 0.25
"""Seconds between two reports of steps."""

PREVIEW_INTERVAL = 1.0
"""Seconds between two previews of a task."""

RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds between attempts to store a result. After them, its job fails."""


class Dispatcher:
    """A worker: a thread that runs the jobs of a store on an engine.

    It survives whatever happens to a job, to the database and to the disk: a job fails with a
    sentence, and a result that cannot be stored is stored later.

    Args:
        store: the queue.
        engine: generates the images.
        worker: name of the worker; no other process uses it. If a process of this name has ended,
            its tasks are put back into the queue when the next one starts.
        max_batch: the most images that are computed at once.
        presets: only jobs of these; all by default.
    """

    def __init__(
        self,
        store: JobStore,
        engine: Engine,
        worker: str,
        max_batch: int = 4,
        presets: Collection[str] | None = None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._worker = worker
        self._max_batch = max_batch
        self._presets = presets
        self._stopping = threading.Event()
        self._awake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dispatcher", daemon=True)
        self._reservation = ExitStack()

    def start(self) -> None:
        """Begin to work.

        Raises:
            OptionError: another process works under this name.
            StoreError: the database is not available.
        """
        self._reservation.enter_context(self._store.reserve(self._worker))
        self._thread.start()

    def wake(self) -> None:
        """Look at the queue now."""
        self._awake.set()

    def stop(self) -> None:
        """Stop after the present step; unfinished images go back into the queue."""
        self._stopping.set()
        self._awake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._reservation.close()

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._awake.clear()
            try:
                tasks = self._store.claim(self._worker, self._max_batch, LEASE, self._presets)
                if tasks:
                    _Run(self._store, self._engine, tasks, self._stopping).finish()
                    continue
            except StoreError:  # logged by the store; the database may come back
                self._stopping.wait(POLL)
            except Exception:
                logger.exception("unexpected error")
                self._stopping.wait(POLL)
            self._awake.wait(POLL)


class _Run:
    """One batch from its claim to the publication of its images."""

    def __init__(
        self, store: JobStore, engine: Engine, tasks: Sequence[Task], stopping: threading.Event
    ) -> None:
        self._store = store
        self._engine = engine
        self._unfinished = {(task.job_id, task.index): task for task in tasks}
        self._stopping = stopping
        self._last_report = -STEP_INTERVAL
        self._last_previews: dict[str, float] = {}

    def finish(self) -> None:
        """Run the batch; afterwards no task of it is claimed any more."""
        with Periodic(self._renew, LEASE / 4):
            try:
                for task, result in self._engine.run(self._tasks(), self._on_step):
                    self._publish(task, result)
            except Stopped:
                pass
            except Interrupted:
                self._store.interrupt(self._tasks())
                return
            except Exception:
                logger.exception("unexpected error")
                for task in self._tasks():
                    self._publish(task, PulidError(UNEXPECTED))
            # those that were stopped; the store knows which of them were cancelled
            if tasks := self._tasks():
                self._store.release(tasks)

    def _tasks(self) -> list[Task]:
        return list(self._unfinished.values())

    def _renew(self) -> None:
        if tasks := self._tasks():
            self._store.renew(tasks, LEASE)

    def _publish(self, task: Task, result: Result) -> None:
        """Publish an image or a failure; try again if the store is not available."""
        for attempt in count():
            try:
                if isinstance(result, PulidError):
                    self._store.fail(task, result)
                else:
                    self._store.publish(task, result)
            except StoreError as error:
                if attempt >= len(RETRY_DELAYS):
                    with suppress(StoreError):
                        self._store.fail(task, error)
                        break
                if self._stopping.wait(RETRY_DELAYS[min(attempt, len(RETRY_DELAYS) - 1)]):
                    return
            else:
                break
        del self._unfinished[task.job_id, task.index]

    def _on_step(
        self, tasks: Sequence[Task], step: int, total: int, preview: Callable[[int], Image.Image]
    ) -> None:
        """Report a step, and stop tasks that nobody waits for."""
        if self._stopping.is_set():
            raise Stopped
        try:
            states = self._store.list_states(tasks)
            if all(state.is_lost for state in states):
                raise Stopped
            now = time.monotonic()
            if step == total or now - self._last_report >= STEP_INTERVAL:
                self._last_report = now
                self._store.report_step(tasks, step, total)
            for position, (task, state) in enumerate(zip(tasks, states, strict=True)):
                last = self._last_previews.get(task.job_id, -PREVIEW_INTERVAL)
                if state.is_watched and now - last >= PREVIEW_INTERVAL:
                    self._last_previews[task.job_id] = now
                    self._save_preview(task, preview, position)
        except StoreError:  # logged by the store; the images can still be stored later
            return

    def _save_preview(
        self, task: Task, preview: Callable[[int], Image.Image], position: int
    ) -> None:
        with suppress(IndexError):  # the image is not computed in this step
            self._store.save_preview(task, encode_image(preview(position), ".jpg"))
