"""Write the shards of a dataset; those that exist already are not written again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openpulid.data.options import PrepareOptions
from openpulid.data.ray_flow import Operator, run_flow
from openpulid.data.records import ImageRecord, from_table, to_table
from openpulid.data.shards import (
    HELD_OUT,
    TRAIN,
    Shard,
    find_written,
    plan_shards,
    write_shard,
)
from openpulid.data.work_folder import WorkFolder
from openpulid.io.files import make_folder, write_json

if TYPE_CHECKING:
    import pyarrow

PLAN = "plan.json"
SHARD = "shard"
"""Column of the name of the shard."""


class WriteStage:
    """Writes shards; called by Ray Data, once per shard.

    Args:
        dataset: its folder.
        work: where the crops are.
    """

    def __init__(self, dataset: Path, work: WorkFolder) -> None:
        self.dataset = dataset
        self.work = work

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Write a shard, whose images are the rows; return where they are in it."""
        name = table[SHARD][0].as_py()
        records = write_shard(self.dataset, Shard(name, from_table(table)), self.work)
        return to_table(records)


def _to_table(shard: Shard) -> pyarrow.Table:
    return to_table(shard.records).append_column(SHARD, [[shard.name] * len(shard.records)])


def write_shards(
    dataset: Path, records: Sequence[ImageRecord], work: WorkFolder, options: PrepareOptions
) -> int:
    """Write the shards, and set where the image of each record is.

    Args:
        dataset: its folder.
        records: the images that are kept.
        work: where the crops are.
        options: see there.

    Returns:
        The number of shards.

    Raises:
        OutputError: the disk is full.
    """
    shards = plan_shards(list(records), options.shard_size, options.seed)
    _reset(dataset, shards, work)
    written = {record.key: record for shard in shards for record in find_written(dataset, shard)}
    waiting = [shard for shard in shards if shard.records[0].key not in written]
    operator = Operator(WriteStage, (dataset, work))
    for table in run_flow([_to_table(shard) for shard in waiting], operator):
        written.update((record.key, record) for record in from_table(table))
    for record in records:
        place = written[record.key]
        record.file, record.offset, record.size = place.file, place.offset, place.size
    return len(shards)


def _reset(dataset: Path, shards: Sequence[Shard], work: WorkFolder) -> None:
    """Delete the shards of another plan, since they have other images."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update(repr([shard.name, shard.records]).encode())
    plan = {"shards": digest.hexdigest()}
    path = work.path / PLAN
    if path.is_file() and json.loads(path.read_bytes()) == plan:
        return
    for split in (TRAIN, HELD_OUT):
        shutil.rmtree(dataset / split, ignore_errors=True)
        if any(shard.name.startswith(f"{split}/") for shard in shards):
            make_folder(dataset / split)
    write_json(path, plan)
