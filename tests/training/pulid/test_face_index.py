"""The face models of a run on photos."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from openpulid.errors import TrainingError
from openpulid.training.distributed import DistributedContext
from openpulid.training.pulid.face_index import check_face_models
from tests.support.two_processes import run_in_two_processes

MODELS = {"glintr100": "a"}


def begin_and_change(folder: Path) -> None:
    """Begin a run whose directory the first process creates late, and change its models."""
    ranks = DistributedContext(torch.device("cpu"))
    file = folder / "run" / "face-models.json"
    if ranks.rank == 0:
        time.sleep(1)
    with ranks.lock(file.parent):
        check_face_models(file, MODELS, ranks)
    with pytest.raises(TrainingError, match="is a run with other face models"):
        check_face_models(file, {"glintr100": "b"}, ranks)


def test_two_processes_begin_in_a_new_directory(tmp_path: Path, start: Any) -> None:
    run_in_two_processes(start, __name__, "begin_and_change", tmp_path)
    assert json.loads((tmp_path / "run" / "face-models.json").read_text()) == MODELS


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_damaged_file_of_models_is_one_sentence(tmp_path: Path, content: str) -> None:
    file = tmp_path / "face-models.json"
    file.write_text(content)
    with pytest.raises(TrainingError, match=r"face-models.json is damaged: delete it"):
        check_face_models(file, MODELS, DistributedContext(torch.device("cpu")))
