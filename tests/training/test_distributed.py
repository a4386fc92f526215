"""The environment of a training process."""

from __future__ import annotations

import pytest
import torch

from openpulid.errors import TrainingError
from openpulid.training.distributed import DistributedContext


@pytest.mark.parametrize("rank", ["x", "3", ""])
def test_incomplete_launcher_variables_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    from accelerate import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(TrainingError, match=r"LOCAL_RANK, .*; start the run with torchrun"):
        DistributedContext(torch.device("cpu"))
