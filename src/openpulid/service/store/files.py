"""Files in the data folder: only the service's user can read them, and they survive a power cut."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from openpulid.errors import OptionError, StoreError

logger = logging.getLogger(__name__)

MARKER = ".openpulid-service"
"""File by which a data folder is recognized."""

FOLDER_MODE = 0o700
FILE_MODE = 0o600

FREE_BYTES = 256 << 20
"""Space on the disk below which nothing is accepted."""

ORPHAN_AGE = 3600
"""Seconds. The files of a job that is being submitted have no record yet, but are younger."""


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn a failed file operation into a StoreError, and log its path.

    Args:
        path: the file or folder.

    Raises:
        StoreError: see above.
    """
    try:
        yield
    except OSError as error:
        logger.error("%s: %s", path, error.strerror or error)
        raise StoreError.of_file(error) from error


def open_data_folder(path: Path) -> None:
    """Create the data folder, or check that it is one: old files in it are removed one day.

    Raises:
        OptionError: it cannot be created, or holds something else.
    """
    marker = path / MARKER
    try:
        path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        is_other = not marker.exists() and any(path.iterdir())
        if not is_other:
            path.chmod(FOLDER_MODE)
            marker.touch(FILE_MODE)
    except OSError as error:
        raise OptionError(
            f"{path} cannot be used ({error.strerror or error}); choose another folder with --data."
        ) from None
    if is_other:
        raise OptionError(
            f"{path} holds other files than a service's; choose a new or empty folder with --data."
        )


def make_private_folder(path: Path) -> None:
    """Create a folder within the data folder, which only this user can open.

    Raises:
        StoreError: it cannot be created.
    """
    with plain_errors(path):
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file. When this returns, the file and its name are on the disk.

    Raises:
        StoreError: it cannot be written; no part of it is left.
    """
    with plain_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            sync_folder(path.parent)
        except BaseException:
            remove_file(path)
            raise


def link_durably(source: Path, path: Path) -> None:
    """Give a file of the data folder a second name, which stays when the first is removed.

    Raises:
        StoreError: there is no such file, or no name can be added.
    """
    with plain_errors(path):
        os.link(source, path)
        sync_folder(path.parent)


def check_free_space(folder: Path, needed: int) -> None:
    """Check that a disk has room.

    Args:
        folder: on the disk.
        needed: bytes.

    Raises:
        StoreError: there is less.
    """
    with plain_errors(folder):
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    with suppress(OSError):
        path.unlink()


def remove_folder(path: Path) -> None:
    """Remove a folder with its files, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def remove_orphans(folder: Path, names: Collection[str]) -> None:
    """Remove what a crash has left: entries that have no record, and are not being made now.

    Args:
        folder: its entries are files or folders.
        names: entries that have a record.
    """
    with plain_errors(folder):
        for path in folder.iterdir():
            if path.name in names:
                continue
            with suppress(OSError):  # another process may remove it as well
                if time.time() - path.stat().st_mtime < ORPHAN_AGE:
                    continue
                if path.is_dir():
                    remove_folder(path)
                else:
                    remove_file(path)
