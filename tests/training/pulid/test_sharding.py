"""FLUX's transformer shared by two processes: the losses of one, and its checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openpulid.errors import OptionError
from openpulid.training.pulid.batch import Batch
from openpulid.training.rng import StepRNG
from openpulid.training.sharding import shard_network
from openpulid.training.trainer import run
from tests.support.flow_training import STAGES, create_task, models
from tests.support.two_processes import run_in_two_processes

STEPS = 4
SETTINGS: dict[str, Any] = {
    **STAGES["stage3"],
    "steps": STEPS,
    "validate_every": 2,
    "gradient_checkpointing": True,
}


def train(folder: Path, is_sharded: bool = False, stop_before: int | None = None) -> None:
    """Train stage 3; with `stop_before`, leave a checkpoint before that step."""
    task = create_task(**SETTINGS)
    for model in (task.base, *task.few_step_models):
        model.network.enable_gradient_checkpointing()
        if is_sharded:
            shard_network(model.network, model.blocks)
    task.is_sharded = is_sharded
    read = task.data.batch

    def batch(rng: StepRNG) -> Batch:
        if rng.step == stop_before:
            raise MemoryError("killed")
        return read(rng)

    task.data.batch = batch
    config = replace(task.recipe.trainer_config(), log_every=1, save_minutes=0.0)
    if stop_before is None:
        run(task, config, folder, is_sharded=is_sharded)
        return
    with pytest.raises(MemoryError):
        run(task, config, folder, is_sharded=is_sharded)


def train_together(folder: Path) -> None:
    """Train in a process of two."""
    for name in ("whole", "continued", "begun"):
        train(folder / name, is_sharded=True, stop_before=2 if name == "begun" else None)
    torch.distributed.destroy_process_group()


def records_of(folder: Path, kind: str) -> dict[int, dict[str, float]]:
    history = json.loads((folder / "history.json").read_text())
    return {record["step"]: record[kind] for record in history if kind in record}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Path:
    """Train in one process, and begin a run that two processes will continue."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder / "whole")
    train(folder / "begun", stop_before=2)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: Any, start: Any, alone: Path) -> Path:
    """Train in two processes that share the transformers."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(alone / "begun", folder / "continued")
    run_in_two_processes(start, __name__, "train_together", folder)
    return folder


@pytest.mark.parametrize("kind", ["losses", "metrics"])
@pytest.mark.parametrize("run", ["whole", "continued"])
def test_sharded_processes_match_one(alone: Path, together: Path, run: str, kind: str) -> None:
    """Every loss and metric, also after a checkpoint of one process."""
    expected = records_of(alone / "whole", kind)
    found = records_of(together / run, kind)
    assert expected.keys() == found.keys() and len(expected) >= 2
    for step, values in expected.items():
        # two processes validate in two parts, so that other people are swapped
        for name in ("held_out_other", "held_out_over_other", "held_out_over_other_se"):
            values.pop(name, None)
            found[step].pop(name, None)
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-6), step


def test_sharded_checkpoint_continues_in_one_process(
    alone: Path, together: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(together / "begun", folder)
    train(folder)
    expected = records_of(alone / "whole", "losses")
    for step, values in records_of(folder, "losses").items():
        assert values == pytest.approx(expected[step], rel=1e-5, abs=1e-6), step


def test_one_process_cannot_shard() -> None:
    base, _ = models()
    with pytest.raises(OptionError, match="over several processes: start the training with"):
        shard_network(base.network, base.blocks)
