"""Prepare a dataset for training from folders, archives and tables of images.

    sources -> faces (batches) -> duplicates -> captions (batches) -> people -> shards -> index

Results of batches are kept in the folder `.work` of the dataset until the index is written, so that
the command can be run again after any failure.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openpulid import __version__
from openpulid.data.batches import BatchRunner
from openpulid.data.dataset_folder import DatasetFolder
from openpulid.data.examples import write_examples
from openpulid.data.index import DatasetInfo, is_dataset, read_index, write_index
from openpulid.data.models import check_models
from openpulid.data.options import PrepareOptions
from openpulid.data.records import ImageRecord
from openpulid.data.selection import select_images
from openpulid.data.shard_writer import write_shards
from openpulid.data.sources import SourceImage, find_sources
from openpulid.io.lock import lock_directory
from openpulid.ray_session import LOCAL, check_address, connect_ray


@dataclass(frozen=True)
class Summary:
    """What a dataset holds.

    Attributes:
        decisions: number of images by decision, see `DECISIONS`.
        splits: number of images by split.
        people: number of people in the dataset.
        shards: number of shards.
    """

    decisions: Mapping[str, int]
    splits: Mapping[str, int]
    people: int
    shards: int


@dataclass(frozen=True)
class Resources:
    """Where a dataset is prepared.

    Attributes:
        address: of a Ray cluster, see `check_address`.
        workers: processes on this machine; one per processor by default.
    """

    address: str = LOCAL
    workers: int | None = None


def prepare_dataset(
    sources: Sequence[Path],
    dataset: Path,
    options: PrepareOptions,
    resources: Resources | None = None,
    *,
    is_fresh: bool = False,
    keep_work: bool = False,
    log: Callable[[str], None] = print,
) -> Summary:
    """Prepare a dataset, or continue after an interruption.

    Args:
        sources: folders, tar archives and parquet files of images.
        dataset: folder to write; on a cluster, all nodes see it and the sources under their paths.
        options: what is kept and how.
        resources: where to compute.
        is_fresh: delete an existing dataset first.
        keep_work: keep the results of batches, so that sources can be added later.
        log: receives a line about the progress.

    Raises:
        OptionError: a source does not exist, the folder holds something else, or a dataset of other
            options or sources.
        WeightsError: a model is not installed.
        TrainingError: an archive or an intermediate file is damaged.
        OutputError: the disk is full.
    """
    resources = resources or Resources()
    check_address(resources.address)
    images = find_sources([source.resolve() for source in sources], dataset)
    log(f"{len(images):,} images in the sources")
    has_captions = all(image.caption for image in images) and not options.replace_captions
    models = check_models(options, not has_captions)
    info = DatasetInfo(options, _hash_sources(images), models, __version__)
    folder = DatasetFolder(dataset.resolve())
    folder.check()
    with lock_directory(folder.path):
        if is_fresh:
            folder.delete()
        if is_dataset(folder.path):
            folder.check_complete(info)
            log(f"{dataset} is complete")
            return summarize(read_index(folder.path))
        folder.start(info)
        with connect_ray(resources.address, resources.workers, extra="data"):
            records = _run_steps(folder, info, images, log)
        if not keep_work:
            folder.work.remove()
    return summarize(records)


def summarize(records: Sequence[ImageRecord]) -> Summary:
    """Count the images of a dataset."""
    kept = [record for record in records if record.is_kept]
    return Summary(
        decisions=dict(Counter(record.decision for record in records)),
        splits=dict(Counter(record.split for record in kept)),
        people=len({record.person for record in kept}),
        shards=len({record.file for record in kept}),
    )


def _run_steps(
    folder: DatasetFolder,
    info: DatasetInfo,
    images: Sequence[SourceImage],
    log: Callable[[str], None],
) -> list[ImageRecord]:
    """Run all steps; each continues what exists already.

    Returns:
        The records of all images.
    """
    runner = BatchRunner(info.options, folder.work, log)
    records = runner.analyze_faces(images)
    kept = select_images(records, folder.work, info.options, runner.caption)
    people = len({record.person for record in kept})
    log(f"{len(kept):,} images of {people:,} people")
    count = write_shards(folder.path, kept, folder.work, info.options)
    log(f"{count:,} shards written")
    by_key = {image.key: image for image in images}
    write_examples(folder.path, records, by_key, info.options.seed)
    write_index(folder.path, records, info)
    return records


def _hash_sources(images: Sequence[SourceImage]) -> str:
    """Return a hash of the names and versions of all images."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(f"{image.key} {image.version}\n".encode())
    return digest.hexdigest()
