"""The folders where weights are stored, and their free space."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from openpulid.doctor.report import Section
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS, find_download_folder


def check() -> Section:
    """List the folders; a problem is one that PULID_WEIGHTS names and that does not exist."""
    folders = {str(find_download_folder(name)): "downloads" for name in WEIGHTS}
    problems = []
    if own := os.environ.get(FOLDER_VARIABLE):
        folders[own] = FOLDER_VARIABLE
        if not Path(own).expanduser().is_dir():
            problems.append(
                f"the environment variable {FOLDER_VARIABLE} names {own}, which is no folder; "
                "correct or unset it."
            )
    rows = tuple(
        (use, folder, f"{measure_free_space(folder) / 10**9:.1f} GB")
        for folder, use in folders.items()
    )
    return Section(("use", "folder", "free"), rows, tuple(problems))


def measure_free_space(folder: str | os.PathLike[str]) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    path = Path(folder).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
