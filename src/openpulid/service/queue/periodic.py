"""A function that is called again and again in a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType

from openpulid.errors import StoreError

logger = logging.getLogger(__name__)


class Periodic:
    """Calls a function at equal intervals, from `start` to `stop` or within a `with` block.

    A call that fails is logged, and the next one comes in time.

    Args:
        function: what is called.
        seconds: between two calls; the first call is after that time.
    """

    def __init__(self, function: Callable[[], object], seconds: float) -> None:
        self._function = function
        self._seconds = seconds
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin the calls."""
        self._thread.start()

    def stop(self) -> None:
        """End the calls, after the one that runs."""
        self._is_stopped.set()
        self._thread.join()

    def __enter__(self) -> Periodic:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._is_stopped.wait(self._seconds):
            try:
                self._function()
            except StoreError as error:  # the store has logged the cause
                logger.warning("%s", error)
            except Exception:
                logger.exception("unexpected error")
