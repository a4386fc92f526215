"""Errors that a user can fix.

Every message is one plain sentence that names the problem and the fix. All classes are
``ValueError``. The command line prints only the message and exits with `exit_code`. Any other
exception is a bug in the program and keeps its traceback.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from os import PathLike

MEMORY_MESSAGES = (
    "out of memory",  # CUDA, MPS, HIP, XPU, NCCL
    "out_of_memory",
    "outofmemory",
    "out_of_device_memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "insufficient memory",  # OpenCV
    "failed to allocate memory",  # ONNX Runtime
    "unable to allocate",  # NumPy
    "invalid buffer size",  # MPS
    "_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER
    "cublas_status_not_initialized",  # no memory for a handle
    "cudnn_status_not_initialized",
    "unable to find an engine to execute this computation",  # no memory for a cuDNN workspace
    "bad_alloc",
)
"""What libraries say, in lower case, when memory does not suffice."""

SYSTEM_PACKAGES = {
    "libGL": "libgl1",
    "libEGL": "libegl1",
    "libgthread-2": "libglib2.0-0",
    "libglib-2": "libglib2.0-0",
    "libSM": "libsm6",
    "libICE": "libice6",
    "libXext": "libxext6",
    "libXrender": "libxrender1",
    "libX11": "libx11-6",
    "libxcb": "libxcb1",
    "libgomp": "libgomp1",
}
"""Libraries of the operating system that OpenCV and others need: packages of Debian and Ubuntu."""

UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters, among them line breaks and terminal escapes
    "\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f"  # line separators and changes of direction
    "\u00ad\u180e\u200b\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # other invisible characters
    "\ud800-\udfff]"  # bytes of a file name that are not UTF-8
)


def escape_unprintable(text: str) -> str:
    r"""Replace the characters of a text that could change a terminal or fake another line.

    File names and the metadata of images come from other people. "\x1b[2J" clears the screen.

    Returns:
        One printable line, with Python's escapes such as "\x1b" and "\n".
    """
    return UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # `os.fsdecode` stores the byte b as the code point 0xDC00 + b
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode("ascii")


class PulidError(ValueError):
    """Base class of all errors that a user can fix. `str(error)` is one sentence on one line."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(escape_unprintable(message))


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


class OutOfMemoryError(OptionError):
    """Too little memory on the device. The message has the advice of the command or the page."""


class OutputError(OptionError):
    """A file that cannot be written. The message names the file and the reason."""


class StoreError(PulidError):
    """A record or a file of the service that cannot be read or written, such as on a full disk.

    The message goes to clients, so it names no path; the log does.
    """

    @classmethod
    def of_file(cls, error: OSError) -> StoreError:
        """Describe the failure of a file operation."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return cls("the disk of the service is full; try again later.")
        return cls("a file of the service cannot be read or written; try again later.")


class QueueFullError(PulidError):
    """A job that is not accepted, since too many wait already."""


class TrainingError(PulidError):
    """A training run that cannot continue, for example after a non-finite loss."""


class NonFiniteError(PulidError):
    """A computation that gave NaN or infinity instead of an image. The message has the cause."""


class Stopped(Exception):
    """Raised by the callback of a generation to end it. The finished images are kept."""


def suggest(name: object, choices: Iterable[str]) -> str:
    """Return " (did you mean 'mini'?)" for a misspelled name, or "" if no choice is similar.

    Args:
        name: what the user typed; it is compared without case, spaces, dashes and underscores.
            A choice that contains it is similar, too.
        choices: the valid names.
    """
    typed = _normalize(str(name))
    spellings = {_normalize(choice): choice for choice in choices}
    similar = get_close_matches(typed, spellings, 1, 0.6)
    if not similar and len(typed) > 2:
        similar = [spelling for spelling in spellings if typed in spelling]
    return f" (did you mean {spellings[similar[0]]!r}?)" if similar else ""


def _normalize(name: str) -> str:
    return "".join(character for character in name.lower() if character not in " -_")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its period, or the error's class."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".") if lines else "") or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library, or its cause, reports that memory does not suffice."""
    if isinstance(error, PulidError):
        return error.__cause__ is not None and is_out_of_memory(error.__cause__)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    message = str(error).lower()
    return any(text in message for text in MEMORY_MESSAGES)


@contextmanager
def explain_out_of_memory(
    advice: str = "use smaller images (--size) or batches (--batch), a lower --memory, "
    "or another --device",
) -> Iterator[None]:
    """Turn an out-of-memory error of any device into an `OutOfMemoryError` with advice.

    The innermost advice stays: it is that of the command which runs.

    Args:
        advice: what the user can do, in the terms of the command or the page.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"the device has too little memory; {advice}.") from error


def require_libraries(purpose: str, names: Iterable[str], extra: str) -> None:
    """Check that the libraries of an extra are installed.

    Args:
        purpose: what needs them.
        names: of their packages.
        extra: of this package, which installs them.

    Raises:
        OptionError: one is missing.
    """
    missing = ", ".join(name for name in names if find_spec(name) is None)
    if missing:
        raise OptionError(f"{purpose} needs {missing}: pip install 'openpulid[{extra}]'.")


@contextmanager
def explain_missing_library() -> Iterator[None]:
    """Turn the failed import of a package that lacks a system library into an `OptionError`.

    OpenCV needs libraries that minimal systems and containers do not have.
    """
    try:
        yield
    except ImportError as error:
        match = re.search(r"(lib[\w+-]+)\S*\.so\S*: cannot open shared object file", str(error))
        if match is None:
            raise
        library = match[0].partition(":")[0]
        fix = "install the package that contains it."
        if package := SYSTEM_PACKAGES.get(match[1]):
            fix = (
                f"install it (Debian, Ubuntu: apt install {package}), or replace opencv-python "
                "by opencv-python-headless, which does not need it."
            )
        raise OptionError(f"the system library {library} is missing; {fix}") from None
