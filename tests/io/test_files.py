"""Writing files: complete or absent, private from the first byte, without replacing others."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from openpulid.errors import OutputError
from openpulid.io.checkpoints import save_tensors
from openpulid.io.files import is_same_file, replace_file, write_bytes, write_json, write_new
from openpulid.io.metadata import save_image


def test_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_bytes(path, b"old")
    with replace_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old" and temporary.suffix == ".txt"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    image = Image.new("RGB", (8, 8), "red")
    path = tmp_path / "a.png"
    save_image(image, path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr("os.fsync", fail)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save_image(Image.new("RGB", (8, 8)), path)
    with pytest.raises(expected):
        write_new(path, b"other")
    assert os.listdir(tmp_path) == ["a.png"] and path.read_bytes() == before


def test_threads_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    images = [Image.new("RGB", (16, 16), (k, 0, 0)) for k in range(40)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda image: save_image(image, path), images))
    assert os.listdir(tmp_path) == ["a.png"] and Image.open(path).getpixel((0, 0))[1:] == (0, 0)


def test_threads_never_share_a_new_name(tmp_path: Path) -> None:
    contents = [str(k).encode() for k in range(20)] * 2
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda data: write_new(tmp_path / "a.txt", data), contents))
    assert [path.read_bytes() for path in paths] == contents
    assert len(set(paths)) == len(os.listdir(tmp_path)) >= 20


def test_new_name_avoids_everything_that_exists(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"photo")
    (tmp_path / "a-2.png").mkdir()
    (tmp_path / "a-3.png").symlink_to(tmp_path / "nowhere")
    assert write_new(tmp_path / "a.png", b"image").name == "a-4.png"
    assert write_new(tmp_path / "a.png", b"image").name == "a-4.png"
    assert write_new(tmp_path / "a.png", b"photo").name == "a.png"
    assert not (tmp_path / "nowhere").exists()


def test_modes_of_files(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        paths = {
            0o600: write_bytes(tmp_path / "identity", b"", private=True),
            0o644: save_tensors({"x": torch.zeros(1)}, tmp_path / "deep" / "a.safetensors"),
        }
    finally:
        os.umask(previous)
    for mode, path in paths.items():
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_errors_name_the_file(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    for write in (
        lambda: write_bytes(tmp_path / "none" / "a.txt", b""),
        lambda: write_new(tmp_path / ("x" * 300), b""),
    ):
        with pytest.raises(OutputError, match=r"cannot be written \(.+\); free some disk space"):
            write()
    for write in (
        lambda: write_json(blocked / "a.json", {}),
        lambda: save_tensors({"x": torch.zeros(1)}, blocked / "a.safetensors"),
    ):
        with pytest.raises(
            OutputError, match=r"cannot be used as a folder \(File exists\); choose"
        ):
            write()


def test_same_file_under_other_names(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.png", b"")
    (tmp_path / "link.png").symlink_to(path)
    assert is_same_file(path, tmp_path / "link.png")
    assert is_same_file(path, f"{tmp_path}/../{tmp_path.name}/a.png")
    assert not is_same_file(path, tmp_path / "none.png")
