"""A lock on a directory: one process at a time writes into it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from openpulid.errors import OptionError

logger = logging.getLogger(__name__)

LOCK = "run.lock"
"""Name of the lock's file, which stays in the directory."""


@contextmanager
def lock_directory(directory: Path, option: str = "-o") -> Iterator[None]:
    """Reserve a directory for this process inside the block; create it if it is missing.

    The operating system frees the lock when the process ends, even if it is killed.

    Args:
        directory: the directory.
        option: with which the user chooses another one.

    Raises:
        OptionError: another process uses the directory, or it cannot be written.
    """
    descriptor = _open_lock(directory, option)
    try:
        _acquire(descriptor, directory, option)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def wait_for_directory(directory: Path) -> Iterator[None]:
    """Reserve a directory as `lock_directory` does; wait while another process uses it.

    Raises:
        OptionError: it cannot be written.
    """
    descriptor = _open_lock(directory, "-o")
    try:
        with suppress(OSError):  # no locks on this file system
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_directory(directory: Path) -> None:
    """Check that a directory can be locked, or created. One that does not exist is not created.

    Raises:
        OptionError: another process uses the directory, or it cannot be written.
    """
    if directory.is_dir():
        with lock_directory(directory):
            return
    parent = next(path for path in directory.absolute().parents if path.exists())
    if directory.exists() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OptionError(
            f"{directory}: cannot be created in {parent}; choose another directory with -o."
        )


def _open_lock(directory: Path, option: str) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        reason = error.strerror or error
        raise OptionError(
            f"{directory}: cannot be written ({reason}); choose another directory with {option}."
        ) from None


def _acquire(descriptor: int, directory: Path, option: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # no locks on this file system
            logger.warning(
                "%s: the file system has no locks; do not start two runs in it.", directory
            )
            return
        owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise OptionError(
            f"{directory} is in use by another process{f' ({owner})' if owner else ''}; wait for "
            f"it, stop it, or choose another directory with {option}."
        ) from None
    with suppress(OSError):  # only for the message above: a full disk must not stop the run
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
