"""Two processes train as one does, and validate in parts; in both precisions."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from openpulid.training.trainer import run
from tests.support import tiny_sdxl as tiny
from tests.support.two_processes import run_in_two_processes

STAGE3 = {
    "id_loss": "accurate",
    "few_step_batch": 2,
    "grad_steps": 2,
    "semantic_weight": 0.6,
    "layout_weight": 0.1,
}
STAGES = {"stage1": {}, "stage3": STAGE3}
STEPS = {"stage1": 12, "stage3": 4}


def set_bf16(available):
    """Let this process believe that its device has bfloat16, or not."""
    for name, module in list(sys.modules.items()):
        if name.startswith("openpulid") and hasattr(module, "supports_bf16"):
            module.supports_bf16 = lambda device: available


def train(stage, folder, counted=False):
    """Train a stage; with `counted`, write the size of every batch to FOLDER.data and .held_out."""
    task = tiny.task(**STAGES[stage])
    if counted:
        count_batches(task.data, f"{folder}.data")
        count_batches(task.validation.data, f"{folder}.held_out")
    config = replace(
        tiny.recipe().trainer_config(), steps=STEPS[stage], validate_every=100, log_every=1
    )
    run(task, config, folder)


def train_everything(folder):
    """Train all stages in both precisions, in a process of two."""
    for has_bf16 in (True, False):
        set_bf16(has_bf16)
        for stage in STAGES:
            train(stage, folder / f"{stage}-{has_bf16}", counted=True)


def count_batches(source, path):
    read = source.batch

    def batch(rng):
        result = read(rng)
        with open(path, "a") as file:
            print(len(result.latents), file=file)
        return result

    source.batch = batch


@pytest.fixture(scope="module")
def two(tmp_path_factory, start):
    """Train all stages in two processes, in both precisions."""
    folder = tmp_path_factory.mktemp("two")
    run_in_two_processes(start, __name__, "train_everything", folder)
    return folder


def losses_of(folder):
    history = json.loads((folder / "history.json").read_text())
    return {r["step"]: r["losses"] for r in history if "losses" in r}


# bfloat16 rounds each half of the batch on its own
@pytest.mark.parametrize(("stage", "rel"), [("stage1", (1e-2, 1e-5)), ("stage3", (2e-2, 1e-4))])
def test_two_processes_match_one(two, tmp_path, both_precisions, stage, rel):
    train(stage, tmp_path / "one")
    expected = losses_of(tmp_path / "one")
    losses = losses_of(two / f"{stage}-{both_precisions}")
    assert len(expected) == STEPS[stage]
    tolerance = rel[0] if both_precisions else rel[1]
    for step in expected:
        assert losses[step] == pytest.approx(expected[step], rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_one_of_two_processes_validates_in_parts(two, has_bf16):
    """It validates alone, and has memory for what it reads in a step."""
    for name in ("data", "held_out"):
        sizes = (two / f"stage3-{has_bf16}.{name}").read_text().split()
        assert {int(size) for size in sizes} == {2}
