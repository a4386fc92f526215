"""Scalars for TensorBoard."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventLog:
    """Appends scalars to an event file of TensorBoard.

    `SummaryWriter` writes in a thread, which ends with a traceback on a full disk. Here records
    that cannot be written are kept until they can.

    Args:
        folder: of the event files, one for each start of the run.
        step: number of finished steps; TensorBoard hides what an earlier start logged after it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._pending = io.BytesIO()
        self._add(Event(file_version="brain.Event:2"))
        if step:
            self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Add scalars, named `group/name`, to the records that `flush` writes."""
        summary = [Summary.Value(tag=f"{group}/{k}", simple_value=v) for k, v in values.items()]
        self._add(Event(step=step, summary=Summary(value=summary)))

    def flush(self) -> None:
        """Append all pending records to the file.

        Raises:
            OSError: they cannot be written; they stay pending.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            start = os.fstat(file.fileno()).st_size
            remaining = memoryview(self._pending.getvalue())
            try:
                while remaining:
                    remaining = remaining[file.write(remaining) :]
            except OSError:
                file.truncate(start)  # half a record would hide all that follow
                raise
        self._pending = io.BytesIO()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self._pending).write(event.SerializeToString())
