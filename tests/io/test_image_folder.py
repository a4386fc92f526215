"""Folders of images as users have them: many endings, links, and files of the system."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from openpulid.bench.subjects import load_photo_subjects
from openpulid.data.captioned_images import find_captioned_images
from openpulid.errors import TrainingError
from openpulid.io.image_folder import image_suffixes, list_folder

ENDINGS = ("jpg", "jpeg", "JPG", "jpe", "jfif", "png", "tif", "tiff", "webp", "gif", "bmp", "heic")
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(64)
"""The beginning of the `._NAME` that macOS writes next to NAME on other file systems."""


def write(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def save_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(path)
    return path


def test_captioned_images_of_every_ending_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for number, ending in enumerate(ENDINGS):
        write(folder / f"{number}.{ending}")
        write(folder / f"{number}.txt", b"a caption")
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "anna.jpg")
    write(elsewhere / "anna.TXT", b"a caption")
    (folder / "linked").symlink_to(elsewhere)
    found = find_captioned_images(folder)
    expected = {f"{number}.{ending}" for number, ending in enumerate(ENDINGS)}
    assert set(found.captions) == expected | {"linked/anna.jpg"}
    assert found.captions["linked/anna.jpg"] == "linked/anna.TXT"
    assert found.uncaptioned == []


def test_every_file_that_is_left_out_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "anna.jpg")
    write(tmp_path / "anna.txt", b"a caption")
    write(tmp_path / "ben.jpg")
    write(tmp_path / "carl.jpg")
    write(tmp_path / "carl.txt", b"")
    for name in ("film.mp4", "other.mp4", "raw.cr2"):
        write(tmp_path / name)
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_captioned_images(tmp_path)
    found.report()
    assert list(found.captions) == ["anna.jpg"]
    assert caplog.messages == [
        f"{tmp_path}: skipping 2 of 3 images without a caption NAME.txt; the first is ben.jpg",
        f"{tmp_path}: skipping 3 files that are not images: 2 .mp4, 1 .cr2",
        f"{tmp_path}: skipping 1 folders or links that cannot be read; the first is broken.jpg",
    ]


def test_files_of_the_system_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_image(tmp_path / "anna.jpg")
    for name in ("._anna.jpg", "__MACOSX/._a.jpg", ".hidden/a.jpg", "@eaDir/a.jpg", "Thumbs.db"):
        write(tmp_path / name, APPLE_DOUBLE)
    assert [subject.name for subject in load_photo_subjects(tmp_path)] == ["anna"]
    assert caplog.messages == []
    assert list_folder(tmp_path, recursive=True).images == [Path("anna.jpg")]


def test_person_has_a_folder_also_by_a_link(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_image(tmp_path / "elsewhere" / "1.png")
    write(tmp_path / "elsewhere" / "._1.png", APPLE_DOUBLE)
    people = tmp_path / "people"
    save_image(people / "Anna" / "a.gif")
    write(people / "Anna" / "notes.txt")
    (people / "Ben").symlink_to(tmp_path / "elsewhere")
    (people / "Empty").mkdir()
    subjects = load_photo_subjects(people)
    assert [subject.name for subject in subjects] == ["Anna", "Ben"]
    assert caplog.messages == [
        f"{people}: left out: 1 files that are not images (1 .txt) in Anna; "
        "Empty without an image of its own"
    ]


def test_endings_are_those_that_are_opened() -> None:
    suffixes = image_suffixes()
    assert {".heic", ".heif", ".jpe", ".jfif", ".apng", ".mpo"} <= suffixes
    assert suffixes.isdisjoint({".eps", ".pdf", ".tga", ".psd", ".ico", ".txt"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_captions_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    save_image(tmp_path / "a.png")
    write(tmp_path / "a.txt", "a photo,\r\nschön".encode(encoding))
    assert find_captioned_images(tmp_path).read_caption("a.png") == "a photo, schön"


def pack(archive: Path, folder: Path, mode: str = "w") -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, mode) as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, str(path.relative_to(folder)), recursive=False)
    return archive


def test_images_in_archives_are_those_of_the_files(tmp_path: Path) -> None:
    files = tmp_path / "files"
    for name, color in (("anna/1", "red"), ("anna/2", "blue"), ("ben", "green")):
        save_image(files / f"{name}.png")
        Image.new("RGB", (40, 32), color).save(files / f"{name}.png")
        write(files / f"{name}.txt", f"a {color} image".encode())
    save_image(files / "untold.png")
    write(files / "anna" / "._1.png", APPLE_DOUBLE)
    packed = tmp_path / "packed"
    pack(packed / "shards" / "0.tar", files)
    one, other = find_captioned_images(files), find_captioned_images(packed)
    assert [f"shards/0.tar/{name}" for name in one.captions] == list(other.captions)
    assert other.uncaptioned == [Path("shards/0.tar/untold.png")]
    for name in one.captions:
        inside = f"shards/0.tar/{name}"
        assert one.open_image(name).tobytes() == other.open_image(inside).tobytes()
        assert one.read_caption(name) == other.read_caption(inside)
    people = {name: other.find_person(name) for name in other.captions}
    assert people == {
        "shards/0.tar/anna/1.png": "shards/0.tar/anna",
        "shards/0.tar/anna/2.png": "shards/0.tar/anna",
        "shards/0.tar/ben.png": None,
    }


@pytest.mark.parametrize("mode", ["w:gz", None])
def test_archives_that_cannot_be_read_at_an_offset_raise(tmp_path: Path, mode: str | None) -> None:
    save_image(tmp_path / "files" / "a.png")
    archive = tmp_path / "packed" / "0.tar"
    if mode is None:
        write(archive, b"not an archive")
    else:
        pack(archive, tmp_path / "files", mode)
    with pytest.raises(TrainingError, match=r"0\.tar cannot be read as a tar archive without"):
        find_captioned_images(archive.parent)


def test_archive_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    save_image(tmp_path / "files" / "a.png")
    write(tmp_path / "files" / "a.txt", b"a caption")
    archive = pack(tmp_path / "packed" / "0.tar", tmp_path / "files")
    found = find_captioned_images(archive.parent)
    archive.write_bytes(archive.read_bytes()[:600])
    with pytest.raises(OSError, match="is shorter than when it was listed"):
        found.open_image("0.tar/a.png")
