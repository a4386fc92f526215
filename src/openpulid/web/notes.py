"""Notes of the package's loggers, shown on the page."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class NoteHandler(logging.Handler):
    """Passes the warnings of one thread to a function.

    Args:
        show: shows one note.
    """

    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.show = show
        self.thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record of this handler's thread: others belong to other visitors."""
        if record.thread == self.thread:
            self.show(record.getMessage())


@contextmanager
def show_notes(show: Callable[[str], object]) -> Iterator[None]:
    """Show notes of the package, such as on options without effect, while the context is open.

    Args:
        show: shows one note, which is plain text and may name files of the visitor.
    """
    logger = logging.getLogger("openpulid")
    handler = NoteHandler(show)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
