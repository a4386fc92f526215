"""Run a function in a thread, and receive what it reports while it runs."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

Report = TypeVar("Report")


def iterate_reports(
    run: Callable[[Callable[[Report], None]], None],
) -> Generator[Report, None, None]:
    """Yield what a function reports, while it runs in a thread.

    Args:
        run: receives a function to which it passes its reports.

    Raises:
        Exception: that of the function.
    """
    reports: queue.SimpleQueue[tuple[Report] | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            run(lambda report: reports.put((report,)))
        except BaseException as error:
            reports.put(error)
        else:
            reports.put(None)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), daemon=True)
    thread.start()
    try:
        while (item := reports.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        thread.join()
