"""The revision of the running code, for the metadata of what it trains and measures."""

from __future__ import annotations

import subprocess
from pathlib import Path

from openpulid import __version__


def revision() -> str:
    """Return the commit of the running code, or the version of an installed package.

    "+changes" is appended if Python files of the repository differ from the commit.
    """
    folder = Path(__file__).parent
    try:
        # a virtual environment may be inside another project's repository
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
    except (OSError, subprocess.CalledProcessError):
        return f"openpulid {__version__}"
    return commit + ("+changes" if changes else "")


def _git(folder: Path, *arguments: str) -> str:
    process = subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    )
    return process.stdout.strip()
