"""The files of a dataset: what is refused, and what is deleted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from openpulid.data.dataset_folder import DatasetFolder
from openpulid.data.index import DatasetInfo, is_dataset, read_info, write_index
from openpulid.data.options import Filters, PrepareOptions
from openpulid.data.records import ImageRecord
from openpulid.errors import OptionError

INFO = DatasetInfo(PrepareOptions(), "sources", {"glintr100": "a"}, "0")


def write_dataset(folder: Path) -> DatasetFolder:
    dataset = DatasetFolder(folder)
    dataset.start(INFO)
    (folder / "train").mkdir()
    (folder / "train" / "00000.tar").write_bytes(b"")
    write_index(folder, [ImageRecord("a.png", "0", decision="no_face")], INFO)
    return dataset


def test_complete_dataset_is_the_one_that_is_asked_for(tmp_path) -> None:
    dataset = write_dataset(tmp_path)
    assert read_info(tmp_path) == INFO
    dataset.check()
    dataset.check_complete(INFO)
    with pytest.raises(OptionError, match="with --quality 95, not 50: use that, start again"):
        dataset.check_complete(replace(INFO, options=PrepareOptions(quality=50)))
    stricter = PrepareOptions(filters=Filters(max_yaw=30))
    with pytest.raises(OptionError, match="with --max-yaw 60, not 30"):
        dataset.check_complete(replace(INFO, options=stricter))
    with pytest.raises(OptionError, match="the sources have changed since"):
        dataset.check_complete(replace(INFO, sources="others"))
    with pytest.raises(OptionError, match="was prepared with other face models"):
        dataset.check_complete(replace(INFO, face_models={"glintr100": "b"}))


def test_work_with_other_options_is_refused(tmp_path) -> None:
    dataset = DatasetFolder(tmp_path)
    dataset.start(INFO)
    dataset.start(INFO)
    with pytest.raises(OptionError, match="with --seed 0, not 1"):
        dataset.start(replace(INFO, options=PrepareOptions(seed=1)))
    with pytest.raises(OptionError, match="was prepared with other face models"):
        dataset.start(replace(INFO, face_models={}))


def test_other_batches_continue(tmp_path) -> None:
    other = replace(INFO, options=PrepareOptions(batch=8))
    DatasetFolder(tmp_path / "work").start(INFO)
    DatasetFolder(tmp_path / "work").start(other)
    write_dataset(tmp_path / "data").check_complete(other)


def test_only_the_dataset_is_deleted(tmp_path) -> None:
    dataset = write_dataset(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    dataset.delete()
    assert not is_dataset(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["train", "held-out", "examples"])
def test_folder_of_the_user_is_not_touched(tmp_path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OptionError, match=f"{name} exists and is not of `pulid data prepare`"):
        DatasetFolder(tmp_path).check()
