"""The workers of an ingress: each sends one batch at a time to the replicas of one preset."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from openpulid.errors import OptionError
from openpulid.service.queue.dispatcher import Dispatcher
from openpulid.service.queue.engine import Engine
from openpulid.service.store.jobs import JobStore

MAX_ATTEMPTS = 100
"""Names that are tried for one worker."""


class Workers:
    """Workers that share a queue and an engine.

    Args:
        jobs: the queue.
        engine: runs the batches.
        max_batch: the most images of a batch.
    """

    def __init__(self, jobs: JobStore, engine: Engine, max_batch: int) -> None:
        self._jobs = jobs
        self._engine = engine
        self._max_batch = max_batch
        machine = re.sub("[^A-Za-z0-9-]", "-", socket.gethostname()) or "machine"
        # after a restart, the names are the same: what they have left runs again at once
        self._names = (f"cluster-{machine}-{number}" for number in itertools.count())
        self._workers: list[Dispatcher] = []

    def start(self, numbers: Mapping[str, int]) -> None:
        """Start workers.

        Args:
            numbers: name of a preset -> its workers.

        Raises:
            OptionError: the folder of the workers cannot be written.
            StoreError: the database is not available.
        """
        for preset, number in numbers.items():
            self._workers += [self._start_one(preset) for _ in range(number)]

    def wake(self) -> None:
        """Look at the queue now."""
        for worker in self._workers:
            worker.wake()

    def stop(self) -> None:
        """Stop; unfinished images go back into the queue."""
        if self._workers:
            with ThreadPoolExecutor(len(self._workers)) as threads:
                list(threads.map(Dispatcher.stop, self._workers))

    def _start_one(self, preset: str) -> Dispatcher:
        """Start a worker under the first name that no other process has."""
        for attempt in itertools.count(1):
            name = next(self._names)
            worker = Dispatcher(self._jobs, self._engine, name, self._max_batch, {preset})
            try:
                worker.start()
            except OptionError:
                if attempt == MAX_ATTEMPTS:
                    raise
            else:
                break
        return worker
