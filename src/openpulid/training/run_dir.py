"""Start again in a run directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from openpulid.errors import OptionError
from openpulid.io.lock import lock_directory
from openpulid.training.checkpointing import CHECKPOINT

RUN_FILES = (
    CHECKPOINT,
    "history.json",
    "history.damaged.json",
    "losses.png",
    "sheet-*.png",
    "not-finite-*.safetensors",
    "tensorboard",
)
"""What the trainer writes."""


def delete_run(directory: Path, more_files: Iterable[str] = ()) -> None:
    """Delete a run, but no file of the user's in its directory.

    A directory without a checkpoint contains no run and stays as it is.

    Args:
        directory: the run directory.
        more_files: patterns of the files that a task writes in addition to `RUN_FILES`.

    Raises:
        OptionError: another process uses the directory, or a file cannot be deleted.
    """
    if not (directory / CHECKPOINT).exists():
        return
    delete_files(directory, (*RUN_FILES, *more_files))


def delete_files(directory: Path, patterns: Iterable[str]) -> None:
    """Delete the files of a run directory that match a pattern, in the order of the patterns.

    Raises:
        OptionError: another process uses the directory, or a file cannot be deleted.
    """
    with lock_directory(directory):
        for pattern in patterns:
            for path in directory.glob(pattern):
                _delete(path)


def _delete(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise OptionError(
            f"{path} cannot be deleted ({error.strerror or error}); delete it yourself, or choose "
            "another directory with -o."
        ) from None
