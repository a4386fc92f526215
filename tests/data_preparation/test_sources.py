"""Folders, archives and tables as sources of images."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from openpulid.data.sources import SourceImage, find_sources
from openpulid.errors import OptionError, TrainingError
from openpulid.io.images import open_image


def png(color: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (32, 24), color).save(content, "PNG")
    return content.getvalue()


def color(image: SourceImage) -> tuple[int, ...]:
    pixel = open_image(image.read_image()).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def write_folder(folder: Path) -> Path:
    (folder / "anna").mkdir(parents=True)
    (folder / "anna" / "1.png").write_bytes(png("red"))
    (folder / "anna" / "1.txt").write_text("a  photo\n")
    (folder / "2.png").write_bytes(png("lime"))
    return folder


def write_archive(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in {"ben/3.png": png("blue"), "ben/3.txt": b"in a park"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_images_of_all_kinds_of_sources(tmp_path) -> None:
    folder = write_folder(tmp_path / "photos")
    archive = write_archive(tmp_path / "shard.tar")
    table = tmp_path / "table.parquet"
    images = [{"bytes": png("white"), "path": None}, {"bytes": png("black"), "path": "x.png"}]
    columns = {"image": images, "text": ["one", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), table, row_group_size=1)

    found = find_sources([table, folder, archive])
    assert [image.name for image in found] == [
        "photos/2.png",
        "photos/anna/1.png",
        "shard.tar/ben/3.png",
        "table.parquet/000000000",
        "table.parquet/000000001",
    ]
    colors = [(0, 255, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    assert [color(image) for image in found] == colors
    assert [image.read_caption() for image in found] == ["", "a photo", "in a park", "one", ""]
    assert [image.folder for image in found] == ["", "anna", "shard.tar/ben", "", ""]
    assert len({image.key for image in found}) == 5


def test_sources_of_one_name_have_names_of_their_own(tmp_path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        write_archive(tmp_path / parent / "0.tar")
    archives = find_sources([tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar"])
    assert [image.name for image in archives] == ["0.tar-2/ben/3.png", "0.tar/ben/3.png"]
    folders = [write_folder(tmp_path / name) for name in ("p/a", "q/a", "r/a-2")]
    images = find_sources(folders)
    assert len({image.key for image in images}) == len(images) == 6


def test_archives_and_tables_in_a_folder(tmp_path) -> None:
    folder = write_folder(tmp_path / "photos")
    write_archive(folder / "more.tar")
    table = pyarrow.table({"path": ["../2.png"], "caption": ["a table"]})
    (folder / "tables").mkdir()
    pyarrow.parquet.write_table(table, folder / "tables" / "a.parquet")
    found = {image.name: image for image in find_sources([folder])}
    assert color(found["photos/tables/a.parquet/000000000"]) == (0, 255, 0)
    assert found["photos/tables/a.parquet/000000000"].read_caption() == "a table"
    assert color(found["photos/more.tar/ben/3.png"]) == (0, 0, 255)


def test_images_as_bytes(tmp_path) -> None:
    table = pyarrow.table({"JPG": [png("red")], "TXT": ["a caption"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (image,) = find_sources([tmp_path / "a.parquet"])
    assert color(image) == (255, 0, 0) and image.read_caption() == "a caption"


def test_first_caption_of_a_list(tmp_path) -> None:
    captions = [["a  man", "someone"], [None, "a woman"], [], None]
    table = pyarrow.table({"jpg": [png("red")] * 4, "text": captions})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = find_sources([tmp_path / "a.parquet"])
    assert [image.read_caption() for image in found] == ["a man", "a woman", "", ""]
    # so that a missing captioner is noticed before faces are detected
    assert [bool(image.caption) for image in found] == [True, True, True, False]


@pytest.mark.parametrize("caption", [5, b"a man", [1, 2], {"en": "a man"}])
def test_captions_that_are_no_text_are_refused(tmp_path, caption: object) -> None:
    table = pyarrow.table({"jpg": [png("red")], "Caption": [caption]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(TrainingError, match="the column 'Caption' of captions holds"):
        find_sources([tmp_path / "a.parquet"])


def test_dataset_in_its_source_is_left_out(tmp_path) -> None:
    folder = write_folder(tmp_path / "photos")
    dataset = folder / "dataset"
    before = find_sources([folder], dataset)
    (dataset / "train").mkdir(parents=True)
    write_archive(dataset / "train" / "00000.tar")
    (dataset / "index.parquet").write_bytes(b"")
    (folder / "link").symlink_to(dataset)
    assert find_sources([folder], dataset) == before
    with pytest.raises(OptionError, match="dataset is a source: choose another folder with -o"):
        find_sources([folder, dataset], dataset)


def test_names_do_not_depend_on_where_sources_are(tmp_path) -> None:
    one = write_folder(tmp_path / "a" / "photos")
    other = write_folder(tmp_path / "b" / "photos")
    assert [x.key for x in find_sources([one])] == [x.key for x in find_sources([other])]
    both = [image.name for image in find_sources([one, other])]
    assert both == ["photos-2/2.png", "photos-2/anna/1.png", "photos/2.png", "photos/anna/1.png"]


def test_name_that_is_no_text(tmp_path) -> None:
    """File names are bytes on Linux; a table holds text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"\xff\n.png", b"\xff\n.txt"):
        path = os.path.join(os.fsencode(folder), name)
        with open(path, "wb") as file:
            file.write(png("red") if name.endswith(b"png") else b"a person")
    (image,) = find_sources([folder])
    assert image.name == r"photos/\xff\n.png"
    (row,) = pyarrow.Table.from_pylist([image.to_row()]).to_pylist()
    again = SourceImage.from_row(row)
    assert again == image and color(again) == (255, 0, 0) and again.read_caption() == "a person"


def test_changed_file_is_noticed(tmp_path) -> None:
    folder = write_folder(tmp_path / "photos")
    before = find_sources([folder])
    os.utime(folder / "2.png", (1, 1))
    after = find_sources([folder])
    assert [x == y for x, y in zip(before, after, strict=True)] == [False, True]


def test_changed_caption_is_a_new_version(tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png("red"))
    caption = folder / "a.txt"
    versions = []
    for text, modified in (("a person", 5), ("a person in a park", 6), ("", 7), (None, 0)):
        if text is None:
            caption.unlink()
        else:
            caption.write_text(text)
            os.utime(caption, (modified, modified))
        versions.append(find_sources([folder])[0].version)
    # an empty caption is none
    assert len({*versions}) == 3 and versions[2] == versions[3]
    moved = folder.rename(tmp_path / "moved") / "a.png"
    assert find_sources([moved.parent])[0].version == versions[3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "missing does not exist; name a folder of images"),
        ("empty", "empty holds no image; name another source"),
        ("notes.zip", "notes.zip is no folder, tar archive"),
    ],
)
def test_unusable_source_is_one_sentence(tmp_path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.zip").write_bytes(b"PK")
    with pytest.raises(OptionError, match=message):
        find_sources([tmp_path / name])


def test_damaged_table_is_one_sentence(tmp_path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(TrainingError, match="cannot be read as a parquet file"):
        find_sources([tmp_path / "a.parquet"])
    pyarrow.parquet.write_table(pyarrow.table({"age": [3]}), tmp_path / "b.parquet")
    with pytest.raises(TrainingError, match="has no column of images: name it 'image'"):
        find_sources([tmp_path / "b.parquet"])
