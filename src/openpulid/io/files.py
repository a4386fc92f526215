"""Write files that are complete or absent, without replacing what a user has."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from openpulid.errors import OutputError

PRIVATE_MODE = 0o600
PUBLIC_MODE = 0o666
"""Before the user's umask."""


@contextmanager
def replace_file(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[Path]:
    """Give a temporary file that takes the place of `path` when the block ends.

    The file gets a unique name in the same folder, so that any number of threads and processes can
    write the same path. It is flushed to the disk before it is renamed. After an error, a signal or
    a full disk, an existing file at `path` is as it was.

    Args:
        path: the file to write. Its folder exists.
        private: only the owner can read the file, from its first byte on.

    Yields:
        The temporary file, with the suffix of `path`.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".part-{secrets.token_hex(8)}{path.suffix}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(temporary, flags, PRIVATE_MODE if private else PUBLIC_MODE)
        mode = os.fstat(descriptor).st_mode
        os.close(descriptor)
        yield temporary
        os.chmod(temporary, mode)  # a library may have replaced the file by one with another mode
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or error
    return OutputError(
        f"{path} cannot be written ({reason}); free some disk space, or choose another path."
    )


def write_bytes(path: str | os.PathLike[str], data: bytes, *, private: bool = False) -> Path:
    """Write a file in one step, replacing an existing one.

    Args:
        path: the file to write. Its folder exists.
        data: its content.
        private: only the owner can read the file.

    Raises:
        OutputError: the file cannot be written; an existing one is as it was.
    """
    with replace_file(path, private=private) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Write JSON in one step, replacing an existing file; create its folder.

    Raises:
        OutputError: the file cannot be written; an existing one is as it was.
    """
    path = Path(path)
    make_folder(path.parent)
    return write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())


def make_folder(path: Path) -> None:
    """Create a folder and its parents if they are missing.

    Raises:
        OutputError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be used as a folder ({error.strerror or error}); choose another one."
        ) from error


def write_new(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file under a name that no other content has.

    If `path` exists with other content, the name gets a number: `name-2.png`, `name-3.png` and so
    on. A file that has this content already is not written again.

    Args:
        path: the wanted name. Its folder exists.
        data: the content.

    Returns:
        The file with this content.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    candidate = path
    number = 1
    while not has_content(candidate, data) and not _create(candidate, data):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _create(path: Path, data: bytes) -> bool:
    """Write a file unless its name is taken; return whether it was written."""
    try:
        # reserves the name, also against other processes
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PUBLIC_MODE))
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        write_bytes(path, data)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return True


def has_content(path: Path, data: bytes) -> bool:
    """Return whether a file exists and holds exactly these bytes."""
    try:
        return path.stat().st_size == len(data) and path.is_file() and path.read_bytes() == data
    except OSError:
        return False


def is_same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Return whether two paths name one existing file, also through links."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
