"""Private temporary folders are removed at the end, by a signal, and after a killed process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from openpulid.io.temporary import private_directory, remove_orphans

KEEP_OPEN = """
import time
from openpulid.io.temporary import private_directory
with private_directory() as directory:
    (directory / "photo.png").write_bytes(b"photo")
    print(directory, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folder_is_private_and_removed(temporary: Path) -> None:
    with private_directory() as directory:
        assert directory.parent == temporary and directory.name.startswith("openpulid-")
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "photos").mkdir()
    assert os.listdir(temporary) == []
    with pytest.raises(KeyboardInterrupt), private_directory():
        raise KeyboardInterrupt
    assert os.listdir(temporary) == []


def test_folder_of_a_killed_process_is_removed(temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KEEP_OPEN]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        remove_orphans()
        assert (directory / "photo.png").exists()  # its process runs
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert directory.exists()
    with private_directory():
        assert not directory.exists()


def test_folders_of_the_user_are_kept(temporary: Path) -> None:
    (temporary / "openpulid-results").mkdir()
    (temporary / "openpulid-results" / "image.png").write_bytes(b"image")
    (temporary / "openpulid-link").symlink_to(temporary / "openpulid-results")
    with private_directory() as one, private_directory() as other:
        assert one != other and one.exists()
    assert sorted(os.listdir(temporary)) == ["openpulid-link", "openpulid-results"]
    assert (temporary / "openpulid-results" / "image.png").exists()
