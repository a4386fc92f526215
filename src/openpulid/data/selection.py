"""Decisions that need all images: duplicates, people, and the people that are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from openpulid.data.identity_words import remove_identity_words
from openpulid.data.options import PrepareOptions
from openpulid.data.records import DUPLICATE, NO_CAPTION, ImageRecord
from openpulid.data.shards import HELD_OUT, TRAIN
from openpulid.data.similar import connect, find_duplicates, find_pairs, find_people
from openpulid.data.work_folder import WorkFolder


def select_images(
    records: Sequence[ImageRecord],
    work: WorkFolder,
    options: PrepareOptions,
    caption: Callable[[Sequence[ImageRecord]], None],
) -> list[ImageRecord]:
    """Select the images of a dataset, and set their captions, people and splits.

    Args:
        records: of all images, which are changed.
        work: where the face embeddings are.
        options: see there.
        caption: captions the images that have no caption.

    Returns:
        The images that are kept.
    """
    if not options.captioner:
        drop_uncaptioned(records)
    drop_duplicates(records, work, options)
    if options.captioner:
        caption(records)
        drop_uncaptioned(records)
    check_identity_words(records, options)
    assign_people(records, work, options)
    return [record for record in records if record.is_kept]


def drop_uncaptioned(records: Sequence[ImageRecord]) -> None:
    """Drop the images without a caption."""
    for record in records:
        if record.is_kept and not record.caption:
            record.decision = NO_CAPTION


def drop_duplicates(
    records: Sequence[ImageRecord], work: WorkFolder, options: PrepareOptions
) -> None:
    """Drop all but the largest crop of images that are the same."""
    kept = [record for record in records if record.is_kept]
    if not kept:
        return
    groups = find_duplicates(
        [record.phash for record in kept],
        torch.from_numpy(work.read_embeddings(kept)),
        max_bits=options.duplicate_bits,
        same_image=options.duplicate_similarity,
        same_person=options.certain_similarity,
    )
    best: dict[int, ImageRecord] = {}
    for group, record in zip(groups.tolist(), kept, strict=True):
        if group not in best or _rank(record) < _rank(best[group]):
            best[group] = record
    for group, record in zip(groups.tolist(), kept, strict=True):
        if record is not best[group]:
            record.decision, record.duplicate_of = DUPLICATE, best[group].name


def _rank(record: ImageRecord) -> tuple[bool, int, float, str]:
    """Return a key that sorts the best of several equal images first."""
    area = record.crop_width * record.crop_height
    return not record.caption, -area, -(record.face_size or 0), record.name


def assign_people(records: Sequence[ImageRecord], work: WorkFolder, options: PrepareOptions) -> int:
    """Set the person of each image, and hold people out of training.

    A person is held out only if none of their faces is certainly the same as one of another
    person, so that nobody is in both splits under two names.

    Returns:
        The number of people.
    """
    kept = [record for record in records if record.is_kept]
    if not kept:
        return 0
    embeddings = torch.from_numpy(work.read_embeddings(kept))
    pairs, _ = find_pairs(embeddings, options.certain_similarity)
    groups = connect(len(kept), pairs)
    if options.people == "faces":
        people = find_people(embeddings, options.person_similarity)
    else:
        folders = [_folder_name(record, options) for record in kept]
        people = np.unique(folders, return_inverse=True)[1]
    # a person is called after one of their images, whatever the other images are
    first: dict[int, str] = {}
    for person, record in zip(people.tolist(), kept, strict=True):
        first[person] = min(first.get(person, record.key), record.key)
    for person, record in zip(people.tolist(), kept, strict=True):
        record.person, record.split = first[person], TRAIN

    names: dict[int, set[str]] = {}
    for group, record in zip(groups.tolist(), kept, strict=True):
        names.setdefault(group, set()).add(record.person)
    doubtful = {name for group in names.values() if len(group) > 1 for name in group}
    certain = sorted(set(first.values()) - doubtful)
    count = min(round(options.held_out * len(first)), len(certain))
    chosen = np.random.default_rng(options.seed).permutation(len(certain))[:count]
    held_out = {certain[index] for index in chosen}
    for record in kept:
        if record.person in held_out:
            record.split = HELD_OUT
    return len(first)


def _folder_name(record: ImageRecord, options: PrepareOptions) -> str:
    """Return who an image shows: its folder, or the image itself."""
    if options.people == "folders" and record.folder:
        # sources can have folders of the same name
        return f"{record.name.partition('/')[0]}/{record.folder}"
    return record.name


def check_identity_words(records: Sequence[ImageRecord], options: PrepareOptions) -> None:
    """Record the identity words of the captions, and remove them if asked to.

    An image whose caption has no other words is dropped.
    """
    if options.identity_words == "keep":
        return
    for record in records:
        if not record.is_kept:
            continue
        checked = remove_identity_words(record.caption)
        record.identity_words = checked.words
        if options.identity_words == "remove":
            record.caption = checked.caption
    drop_uncaptioned(records)
