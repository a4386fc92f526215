"""`pulid train`: mistakes that need no model and no image, and the advice on memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpulid.mini.train import pulid as mini_training
from tests.cli.conftest import Run

TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
STAGE3 = ("sdxl_stage3", "--batch", 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sdxl_stage1", "--batch", 6), "a --batch of 6 cannot be shared by 4 processes"),
        (("mini_stage1", "--batch", 6), "a --batch of 6 cannot be shared by 4 processes"),
        (("sdxl_stage1", "--batch", 12, "--accumulate", 2), "choose a multiple of 8"),
        ((*STAGE3, "--few-step-batch", 2), "a --few-step-batch of 2 cannot be shared by 4"),
        (("sdxl_stage1", "--shard"), "sdxl_stage1 trains on photos: pass a folder with --data"),
    ],
)
def test_processes_must_share_the_batches(
    pulid: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    done = pulid("train", *words)
    assert done.is_one_sentence and message in done.err, done


def test_one_process_shares_no_networks(pulid: Run) -> None:
    done = pulid("train", "sdxl_stage1", "--shard")
    assert done.is_one_sentence and "can only be sharded over several processes" in done.err


def test_too_little_memory_names_options_of_training(
    pulid: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(mini_training, "train", fail)
    done = pulid("train", "mini_stage1", "-o", tmp_path)
    assert done.is_one_sentence and "(--accumulate)" in done.err and "--size" not in done.err
