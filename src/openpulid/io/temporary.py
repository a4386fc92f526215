"""Temporary folders for images of people: private, and removed even if a process was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "openpulid-"
MARKER = ".openpulid-temporary"
"""File in every private folder. Its process holds a lock on it."""


@contextmanager
def private_directory() -> Iterator[Path]:
    """Create a folder that only its owner can open (mode 0700), and remove it at the end.

    Folders of processes that were killed are removed first.

    Yields:
        The folder, in the system's folder for temporary files.
    """
    remove_orphans()
    directory = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
    lock = None
    try:
        (directory / MARKER).touch()
        lock = _lock(directory)
        # other processes see the name only now, when the folder is locked
        directory = directory.rename(directory.with_name(directory.name.removeprefix(".")))
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_orphans() -> None:
    """Remove the private folders of this user whose process has ended without removing them."""
    for marker in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{MARKER}"):
        directory = marker.parent
        with suppress(OSError):
            # other users can create names in the folder for temporary files
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            lock = _lock(directory)
            if lock is not None:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)


def _lock(directory: Path) -> int | None:
    """Lock a folder until the descriptor is closed, or the process ends.

    Returns:
        A descriptor, or None if another process holds the lock, or the system has none.
    """
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:
        return None
    descriptor = os.open(directory / MARKER, os.O_RDWR)
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
