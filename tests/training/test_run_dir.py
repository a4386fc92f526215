"""A run replaces and deletes its own files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpulid.errors import OptionError
from openpulid.io.lock import LOCK
from openpulid.training.pulid import prepare_run_dir
from openpulid.training.pulid.train import PULID_FILES
from openpulid.training.run_dir import delete_run

RUN = ("run.safetensors", "adapter.safetensors", "history.json", "sheet-0000010.png", "faces.json")


def write_all(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_fresh_run_keeps_the_files_of_the_user(tmp_path: Path) -> None:
    photos = ("anna.jpg", "anna.txt", "notes/history.json", "my-sheet.png")
    write_all(tmp_path, *RUN, "tensorboard/events", *photos)
    prepare_run_dir(tmp_path, tmp_path / "anna.jpg", is_fresh=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left - {LOCK} == set(photos)


def test_folder_without_a_run_is_kept(tmp_path: Path) -> None:
    write_all(tmp_path, "history.json", "losses.png")
    delete_run(tmp_path, PULID_FILES)
    assert (tmp_path / "history.json").exists() and (tmp_path / "losses.png").exists()


def test_fresh_run_forgets_the_faces_of_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    write_all(tmp_path, "faces.json", "held-out-faces.json", "history.json")
    prepare_run_dir(tmp_path, is_fresh=True)
    assert (tmp_path / "faces.json").exists()  # may be the user's own file
    write_all(tmp_path, "face-models.json")
    prepare_run_dir(tmp_path)
    assert (tmp_path / "face-models.json").exists()
    prepare_run_dir(tmp_path, is_fresh=True)
    assert {path.name for path in tmp_path.iterdir()} - {LOCK} == {"history.json"}


def test_run_does_not_replace_an_adapter(tmp_path: Path) -> None:
    write_all(tmp_path, "adapter.safetensors")
    with pytest.raises(OptionError, match=r"exists already, and .* contains no run"):
        prepare_run_dir(tmp_path)
    (tmp_path / "stage1.safetensors").symlink_to(tmp_path / "adapter.safetensors")
    write_all(tmp_path, "run.safetensors")
    with pytest.raises(OptionError, match="would overwrite it"):
        prepare_run_dir(tmp_path, tmp_path / "stage1.safetensors")
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"adapter.safetensors"
