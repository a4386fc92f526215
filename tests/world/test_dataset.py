"""Pictures on disk: resumed where a killed run stopped, labels in line with the scenes."""

import json

import numpy as np
import pytest
import torch

from openpulid.world import ATTRIBUTES, PARAMETERS
from openpulid.world import dataset as module
from openpulid.world.dataset import Plan, WorldDataset, build_dataset, encode_attributes

PLAN = Plan(people=4, scenes=2, size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def data(folder):
    return build_dataset(folder, PLAN, workers=1, compiled=False)


def test_arrays(data):
    assert len(data) == 8 and data.images.shape == (8, 3, 32, 32)
    assert data.vectors.shape == (8, len(PARAMETERS)) and data.attributes.shape == (
        8,
        len(ATTRIBUTES),
    )
    assert data.people.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and set(data.families) == {0}
    np.testing.assert_allclose(data.vectors[2], PLAN.person(1).vector(), rtol=1e-6)
    assert data.attributes[5].tolist() == encode_attributes(PLAN.scene(2, 1))


def test_pictures_are_those_of_their_person_and_scene(data):
    from openpulid.world import render

    again = render([PLAN.person(1)] * 8, [PLAN.scene(1, 1)] * 8, 32)
    np.testing.assert_allclose(data.images[3], (again.image[0] * 255).round().numpy(), atol=1)
    assert data.prompt(3, torch.Generator().manual_seed(0)) == PLAN.scene(1, 1).prompt(
        torch.Generator().manual_seed(0)
    )


def test_a_second_build_only_opens(folder, data):
    before = (folder / "images.npy").stat().st_mtime_ns
    build_dataset(folder, PLAN, workers=1, compiled=False)
    assert (folder / "images.npy").stat().st_mtime_ns == before


def test_another_plan_is_refused(folder, data):
    with pytest.raises(ValueError, match="another plan"):
        build_dataset(folder, Plan(people=8, scenes=2, size=32))


def test_a_plan_written_before_there_were_portraits_is_the_same(folder, data):
    plan = json.loads((folder / "plan.json").read_text())
    del plan["portraits"]
    (folder / "plan.json").write_text(json.dumps(plan))
    assert len(build_dataset(folder, PLAN, workers=1, compiled=False)) == len(data)


def test_an_unfinished_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="pulid mini build world"):
        WorldDataset.open(tmp_path)
    assert module.FAMILY == 4
