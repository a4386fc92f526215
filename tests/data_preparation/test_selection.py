"""Decisions that need all images: duplicates, people, held-out people, identity words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openpulid.data.options import PrepareOptions
from openpulid.data.records import ImageRecord
from openpulid.data.selection import (
    assign_people,
    check_identity_words,
    drop_duplicates,
    drop_uncaptioned,
)
from openpulid.data.work_folder import FACES, WorkFolder
from openpulid.errors import TrainingError
from tests.data_preparation.test_similar import embed_people


def record(name: str, embedding: torch.Tensor | None = None, **values: object) -> ImageRecord:
    faces = [] if embedding is None else embedding.tolist()
    return ImageRecord(name, f"key-{name}", embedding=faces, caption="a photo", **values)


def store(folder: Path, records: list[ImageRecord]) -> WorkFolder:
    work = WorkFolder(folder / "work")
    work.create()
    work.write_batch(FACES, records)
    return work


def test_largest_of_the_duplicates_is_kept(tmp_path) -> None:
    faces = embed_people(3, 1)
    records = [
        record("a", faces[0], crop_width=100, crop_height=100, phash=7),
        record("b", faces[0], crop_width=200, crop_height=200, phash=5),
        record("c", faces[0], crop_width=200, crop_height=200, phash=7),
        record("d", faces[1], crop_width=50, crop_height=50, phash=7),
        record("e", decision="no_face"),
    ]
    drop_duplicates(records, store(tmp_path, records), PrepareOptions())
    assert [x.decision for x in records] == ["duplicate", "kept", "duplicate", "kept", "no_face"]
    assert [x.duplicate_of for x in records] == ["b", "", "b", "", ""]


def test_given_caption_wins_among_duplicates(tmp_path) -> None:
    face = embed_people(1, 1)[0]
    large = replace(record("a", face, crop_width=200, crop_height=200), caption="")
    records = [large, record("b", face, crop_width=100, crop_height=100)]
    drop_duplicates(records, store(tmp_path, records), PrepareOptions())
    assert [x.is_kept for x in records] == [False, True]


def test_people_and_the_held_out_ones(tmp_path) -> None:
    faces = embed_people(10, 4, noise=0.4)
    records = [record(f"{index:02d}", face) for index, face in enumerate(faces)]
    work = store(tmp_path, records)
    options = PrepareOptions(held_out=0.3)
    assert assign_people(records, work, options) == 10
    splits = {x.person: {y.split for y in records if y.person == x.person} for x in records}
    assert len(splits) == 10 and all(len(split) == 1 for split in splits.values())
    assert sum(split == {"held-out"} for split in splits.values()) == 3
    again = [replace(x, person="", split="") for x in reversed(records)]
    assign_people(again, work, options)
    assert sorted(again, key=lambda x: x.name) == records
    assign_people(again, work, replace(options, seed=1))
    assert sorted(again, key=lambda x: x.name) != records


def test_person_who_looks_like_another_is_not_held_out(tmp_path) -> None:
    faces = embed_people(2, 4, noise=0.3)
    between = torch.nn.functional.normalize(faces[0] + faces[1], dim=0)
    records = [record(str(index), face) for index, face in enumerate([*faces, between])]
    # the last image is certainly of both people
    options = PrepareOptions(held_out=0.5, person_similarity=0.3)
    assert options.certain_similarity == 0.65
    assert assign_people(records, store(tmp_path, records), options) == 2
    assert {x.split for x in records} == {"train"}


@pytest.mark.parametrize(("people", "count"), [("folders", 3), ("none", 4)])
def test_people_by_folder_or_unknown(tmp_path, people: str, count: int) -> None:
    face = embed_people(1, 1)[0]
    records = [
        record("photos/anna/1", face, folder="anna"),
        record("photos/anna/2", face, folder="anna"),
        record("more/anna/1", face, folder="anna"),
        record("photos/3", face),
    ]
    options = PrepareOptions(people=people, held_out=0)
    assert assign_people(records, store(tmp_path, records), options) == count


@pytest.mark.parametrize("people", ["folders", "none"])
def test_nobody_is_in_both_splits_under_two_names(tmp_path, people: str) -> None:
    faces = embed_people(2, 1)
    images = [record(f"photos/{k}/1", faces[0], folder=str(k)) for k in range(5)]
    images.append(record("photos/other/1", faces[1], folder="other"))
    options = PrepareOptions(people=people, held_out=0.5)
    assert assign_people(images, store(tmp_path, images), options) == 6
    assert [image.split for image in images] == ["train"] * 5 + ["held-out"]


def test_identity_words_of_captions() -> None:
    def check(mode: str) -> list[ImageRecord]:
        records = [record("a"), record("b"), record("c", decision="no_face")]
        records[0].caption, records[1].caption = "an old man in a park", "with freckles"
        check_identity_words(records, PrepareOptions(identity_words=mode))
        return records

    kept, dropped, other = check("remove")
    assert (kept.caption, kept.identity_words) == ("a man in a park", ["old"])
    assert dropped.decision == "no_caption" and other.decision == "no_face"
    flagged = check("flag")[0]
    assert (flagged.caption, flagged.identity_words) == ("an old man in a park", ["old"])
    assert check("keep")[0].identity_words == []


def test_images_without_caption_are_dropped() -> None:
    records = [record("a"), replace(record("b"), caption="")]
    drop_uncaptioned(records)
    assert [x.decision for x in records] == ["kept", "no_caption"]


def test_damaged_batch_is_one_sentence(tmp_path) -> None:
    records = [record("a", embed_people(1, 1)[0])]
    work = store(tmp_path, records)
    assert work.path.stat().st_mode & 0o777 == 0o700
    (file,) = (work.path / FACES).glob("*.parquet")
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TrainingError, match="is damaged: delete it, and its images are read again"):
        work.read_batches(FACES, records)


@pytest.mark.parametrize("version", [1, 3])
def test_result_of_another_version_does_not_count(tmp_path, version: int) -> None:
    """An image can be replaced by an older file."""
    faces = embed_people(2, 1)
    work = store(tmp_path, [record("a", faces[0], version=2), record("b", faces[0])])
    changed = record("a", faces[1], version=version, decision="blurred")
    assert work.read_batches(FACES, [changed]) == {}
    work.write_batch(FACES, [changed])
    (found,) = work.read_batches(FACES, [changed]).values()
    assert found.decision == "blurred" and found.embedding == []
    embedding = work.read_embeddings([found])
    assert torch.allclose(torch.from_numpy(embedding)[0], faces[1])
