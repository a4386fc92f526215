"""What a user can get wrong: one class each, every message one plain sentence that names the way out.

All of them are ``ValueError``; the command line prints the message alone and ends with `exit_code`. Whatever
is *not* one of these is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

from collections.abc import Iterable
from os import PathLike


class PulidError(ValueError):
    """Base of everything a user can put right. `str(error)` is one sentence fit for a terminal."""

    exit_code = 2


class ImageError(PulidError):
    """A file that cannot be used as a picture: names the file and the reason."""

    def __init__(self, source: str | PathLike[str], reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source, self.reason = str(source), reason


class FaceError(PulidError):
    """No usable face in a picture. The message says what was tried and what to do instead; where a detector found none, so do
    `source`, the picture, its `size` in pixels, and `tried`.
    """

    def __init__(
        self, message: str, source: str = "", size: tuple[int, int] | None = None, tried: str = ""
    ) -> None:
        super().__init__(message)
        self.source, self.size, self.tried = source, size, tried


class IdentityError(PulidError):
    """An identity file that is damaged, or was made by other models than the ones that should read it."""


class PromptError(PulidError):
    """A prompt that the chosen model cannot read. `words` are the ones it does not know."""

    def __init__(self, message: str, words: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.words = tuple(words)


class WeightsError(PulidError):
    """Weights that are missing, damaged or of another shape. The message names the command that gets them."""


class OptionError(PulidError):
    """An argument outside its range, or two arguments that exclude each other."""


class TrainingError(PulidError):
    """A training that cannot go on: a non-finite loss, a checkpoint of another run, missing data."""


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """A device whose memory does not suffice, in one sentence."""
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch's own class of it is one, but not every device raises that
        if not any(said in str(error) for said in ("out of memory", "can't allocate memory")):
            raise
        raise OptionError(
            "the device has too little memory for this; take a smaller --size, for FLUX --memory 12gb, or another --device."
        ) from None
