"""The folder of a run: what belongs to the run, and what does not."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from openpulid.errors import OptionError
from openpulid.io.files import is_same_file
from openpulid.training.checkpointing import CHECKPOINT

ADAPTER_FILE = "adapter.safetensors"
"""The trained adapter in its run directory."""
RUN_FILES = (
    CHECKPOINT,
    ADAPTER_FILE,
    "history.json",
    "losses.png",
    "sheet-*.png",
    "*faces.json",
    "not-finite-*.safetensors",
)
"""Patterns of the files that a run writes."""
LOG_FOLDER = "tensorboard"


def check_run_dir(directory: Path, init_adapter: Path | None = None) -> None:
    """Check that a run in this folder replaces no other file, before anything is loaded.

    Args:
        directory: the run directory.
        init_adapter: the adapter that the run starts from.

    Raises:
        OptionError: the run would replace the adapter that it starts from, or a file of another
            origin.
    """
    adapter = directory / ADAPTER_FILE
    if init_adapter is not None and is_same_file(adapter, init_adapter):
        raise OptionError(
            f"the run would replace {init_adapter}, which it starts from; "
            "choose another run directory with -o."
        )
    if adapter.exists() and not (directory / CHECKPOINT).exists():
        raise OptionError(
            f"{adapter} exists already, and {directory} contains no run; "
            "choose another run directory with -o."
        )


def delete_run(directory: Path) -> None:
    """Delete the files of a run, and its folder if nothing else is in it."""
    if not (directory / CHECKPOINT).exists():
        return
    for pattern in RUN_FILES:
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)
    shutil.rmtree(directory / LOG_FOLDER, ignore_errors=True)
    with suppress(OSError):
        directory.rmdir()
