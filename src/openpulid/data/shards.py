"""The shards of a dataset: which images are in them, and their files."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from openpulid.data.records import ImageRecord
from openpulid.data.work_folder import WorkFolder
from openpulid.io.tar_members import list_members, write_tar

TRAIN = "train"
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Shard:
    """A tar archive of a dataset.

    Attributes:
        name: path in the dataset.
        records: its images, in order.
    """

    name: str
    records: list[ImageRecord]


def plan_shards(records: list[ImageRecord], shard_size: int, seed: int) -> list[Shard]:
    """Distribute images over shards: people in random order, each in a single shard.

    Args:
        records: images that are kept, with person and split.
        shard_size: images after which a shard is complete; it can have more by those of a person.
        seed: of the order.
    """
    shards = []
    for split in (TRAIN, HELD_OUT):
        people: dict[str, list[ImageRecord]] = {}
        for record in sorted(records, key=lambda record: record.key):
            if record.split == split:
                people.setdefault(record.person, []).append(record)
        names = sorted(people)
        order = np.random.default_rng(seed).permutation(len(names))
        current: list[ImageRecord] = []
        parts = []
        for index in order:
            current = current + people[names[index]]
            if len(current) >= shard_size:
                parts.append(current)
                current = []
        if current:
            parts.append(current)
        shards += [Shard(f"{split}/{index:05d}.tar", part) for index, part in enumerate(parts)]
    return shards


def write_shard(folder: Path, shard: Shard, work: WorkFolder) -> list[ImageRecord]:
    """Write a shard in the format of WebDataset: `PERSON/KEY.jpg`, `.txt` and `.json`.

    Args:
        folder: of the dataset.
        shard: the shard.
        work: where the crops are.

    Returns:
        The records, with the places of the images in the shard.

    Raises:
        OutputError: the disk is full.
    """
    written = []
    with write_tar(folder / shard.name) as tar:
        for record in shard.records:
            content = work.read_crop(record)
            stem = f"{record.person}/{record.key}"
            offset = tar.add(f"{stem}.jpg", content)
            tar.add(f"{stem}.txt", record.caption.encode())
            tar.add(f"{stem}.json", json.dumps(_describe(record)).encode())
            written.append(replace(record, file=shard.name, offset=offset, size=len(content)))
    return written


def find_written(folder: Path, shard: Shard) -> list[ImageRecord]:
    """Return the records of a shard that exists, with the places of the images in it.

    Returns:
        Nothing if the shard does not exist.
    """
    if not (folder / shard.name).is_file():
        return []
    members = list_members(folder / shard.name)
    places = [members[f"{record.person}/{record.key}.jpg"] for record in shard.records]
    return [
        replace(record, file=shard.name, offset=place.offset, size=place.size)
        for record, place in zip(shard.records, places, strict=True)
    ]


def _describe(record: ImageRecord) -> dict[str, object]:
    return {
        "width": record.crop_width,
        "height": record.crop_height,
        "box": record.box,
        "landmarks": record.landmarks,
        "person": record.person,
    }
