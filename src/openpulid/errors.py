"""Errors that a user can fix.

Every message is one plain sentence that names the problem and the fix. All classes are
``ValueError``. The command line prints only the message and exits with `exit_code`. Any other
exception is a bug in the program and keeps its traceback.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from threading import get_ident


class PulidError(ValueError):
    """Base class of all errors that a user can fix. `str(error)` is one sentence."""

    exit_code = 2


class ImageError(PulidError):
    """A file that cannot be used as an image. The message names the file and the reason."""

    def __init__(self, source: str | PathLike[str], reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = str(source)
        self.reason = reason


class FaceError(PulidError):
    """No usable face in an image. The message says what was searched and what to do instead.

    Attributes:
        source: the name of the image; empty if the error does not come from a detector.
        size: width and height of the image in pixels, if known.
        search_description: what the detector tried, in words.
    """

    def __init__(
        self,
        message: str,
        source: str = "",
        size: tuple[int, int] | None = None,
        search_description: str = "",
    ) -> None:
        super().__init__(message)
        self.source = source
        self.size = size
        self.search_description = search_description


class IdentityError(PulidError):
    """An identity file that is damaged or was created with other models than the ones in use."""


class PromptError(PulidError):
    """A prompt that the model cannot encode. `words` are the words it does not know."""

    def __init__(self, message: str, words: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.words = tuple(words)


class WeightsError(PulidError):
    """Weights that are missing, damaged or of another shape. The message names the fix."""


class OptionError(PulidError):
    """An argument out of range, or two arguments that exclude each other."""


class TrainingError(PulidError):
    """A training run that cannot continue, for example after a non-finite loss."""


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error of any device into an `OptionError` with advice."""
    try:
        yield
    # torch.OutOfMemoryError is a RuntimeError, but not every device raises that class.
    except RuntimeError as error:
        message = str(error)
        if "out of memory" not in message and "can't allocate memory" not in message:
            raise
        raise OptionError(
            "the device has too little memory; use a smaller --size, "
            "--memory 12gb (FLUX only), or another --device."
        ) from None


class _Collector(logging.Handler):
    """Collects the warnings that one thread logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread = get_ident()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Add a message, unless another thread logged it, or this one before."""
        message = record.getMessage()
        if record.thread == self.thread and message not in self.messages:
            self.messages.append(message)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Collect the warnings that this thread logs, for a front end without a terminal."""
    collector = _Collector()
    package = logging.getLogger("openpulid")
    package.addHandler(collector)
    try:
        yield collector.messages
    finally:
        package.removeHandler(collector)
