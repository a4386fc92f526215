"""Shards: which images are in them, and their files."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from openpulid.data.records import ImageRecord
from openpulid.data.shards import Shard, find_written, plan_shards, write_shard
from openpulid.data.work_folder import FACES, WorkFolder
from openpulid.errors import TrainingError
from openpulid.io.tar_members import TarMember


def store(folder: Path) -> tuple[WorkFolder, list[ImageRecord]]:
    """Store 40 crops of 12 people, three of whom are held out."""
    work = WorkFolder(folder / "work")
    work.create()
    records = [
        ImageRecord(
            str(index),
            f"{index:03d}",
            caption=f"caption {index}",
            person=f"{index % 12:02d}",
            split="held-out" if index % 12 < 3 else "train",
            box=[1.0, 2.0, 3.0, 4.0],
        )
        for index in range(40)
    ]
    work.write_batch(FACES, records, [f"image {index}".encode() * 99 for index in range(40)])
    for split in ("train", "held-out"):
        (folder / split).mkdir()
    return work, records


def test_people_are_not_divided_and_order_is_random(tmp_path) -> None:
    _, records = store(tmp_path)
    shards = plan_shards(records, 8, seed=0)
    assert [shard.name for shard in shards] == [
        "train/00000.tar",
        "train/00001.tar",
        "train/00002.tar",
        "held-out/00000.tar",
        "held-out/00001.tar",
    ]
    assert sorted(x.key for shard in shards for x in shard.records) == [x.key for x in records]
    places = {(x.person, shard.name) for shard in shards for x in shard.records}
    assert len(places) == 12
    assert all(len(shard.records) >= 8 for shard in shards[:4])
    people = list(dict.fromkeys(x.person for shard in shards[:3] for x in shard.records))
    assert people != sorted(people)
    # the order of the input has no effect, the seed has
    assert plan_shards(records[::-1], 8, seed=0) == shards
    assert plan_shards(records, 8, seed=1) != shards


def test_shard_is_in_the_format_of_webdataset(tmp_path) -> None:
    work, records = store(tmp_path)
    shard = plan_shards(records, 8, seed=0)[0]
    written = write_shard(tmp_path, shard, work)
    with tarfile.open(tmp_path / shard.name) as tar:
        names = tar.getnames()
        first = written[0]
        stem = f"{first.person}/{first.key}"
        assert names[:3] == [f"{stem}.jpg", f"{stem}.txt", f"{stem}.json"]
        assert len(names) == 3 * len(shard.records)
        for record in written:
            image = tar.extractfile(f"{record.person}/{record.key}.jpg")
            assert image is not None
            content = TarMember(tmp_path / record.file, record.offset, record.size).read()
            assert content == image.read() == f"image {record.name}".encode() * 99
        text, data = (tar.extractfile(f"{stem}.{kind}") for kind in ("txt", "json"))
        assert text is not None and text.read().decode() == first.caption
        assert data is not None and json.load(data)["box"] == [1, 2, 3, 4]


def test_damaged_archive_of_crops_is_named(tmp_path) -> None:
    work, records = store(tmp_path)
    archive = work.path / records[0].file
    archive.write_bytes(archive.read_bytes()[:600])
    with pytest.raises(TrainingError, match=f"{archive.name} cannot be read .* delete it and "):
        write_shard(tmp_path, Shard("train/00000.tar", records), work)


def test_same_shard_has_the_same_bytes(tmp_path) -> None:
    work, records = store(tmp_path)
    shard = plan_shards(records, 8, seed=0)[0]
    assert find_written(tmp_path, shard) == []
    written = write_shard(tmp_path, shard, work)
    content = (tmp_path / shard.name).read_bytes()
    # batches of the crops were others
    other = WorkFolder(tmp_path / "other")
    other.create()
    again = [replace(record) for record in records[::-1]]
    other.write_batch(FACES, again, [f"image {x.name}".encode() * 99 for x in again])
    places = {x.key: x for x in again}
    moved = replace(shard, records=[places[x.key] for x in shard.records])
    assert write_shard(tmp_path, moved, other) == written == find_written(tmp_path, shard)
    assert (tmp_path / shard.name).read_bytes() == content
