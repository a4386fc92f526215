"""The environment of a launcher, checked before accelerate reads it."""

from __future__ import annotations

import pytest
import torch

from openpulid.errors import OptionError, TrainingError
from openpulid.training import distributed
from openpulid.training.distributed import DistributedContext, check_launcher

TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        TORCHRUN,
        {**TORCHRUN, "WORLD_SIZE": "16", "RANK": "9"},
        {"OMPI_COMM_WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    ],
)
def test_launchers_are_accepted(environment):
    check_launcher(environment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', which is not a valid number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '', which is not a valid number"),
        ({"LOCAL_RANK": "-7"}, "LOCAL_RANK is '-7'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "1.5"}, r"RANK is '1\.5'"),
        ({"RANK": "2"}, "RANK is 2, but there are 2 processes, numbered from 0"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3, but there are 2 processes"),
        ({"LOCAL_RANK": None}, "WORLD_SIZE is set to 2, but LOCAL_RANK is missing"),
        ({"RANK": None}, "WORLD_SIZE is set to 2, but RANK is missing"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE is set to 2, but MASTER_ADDR is missing"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is ''"),
        ({"WORLD_SIZE": None}, "LOCAL_RANK is set to 1, but WORLD_SIZE is missing"),
        ({"PMI_SIZE": "x"}, "PMI_SIZE is 'x'"),
    ],
)
def test_impossible_variables_are_one_sentence(change, message):
    environment = {**TORCHRUN, **change}
    environment = {name: value for name, value in environment.items() if value is not None}
    with pytest.raises(OptionError, match=message):
        check_launcher(environment)


def test_processes_that_cannot_meet_are_one_sentence(monkeypatch):
    def refuse(cpu):
        raise RuntimeError("The client socket has failed to connect.\nException raised from ...")

    monkeypatch.setattr(distributed, "PartialState", refuse)

    with pytest.raises(TrainingError, match=r"cannot reach each other \(The client.*connect\)"):
        DistributedContext(torch.device("cpu"))
