"""Datasets on disk: arrays, labels, and the reuse of what is already rendered."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from openpulid.errors import OptionError
from openpulid.world import ATTRIBUTES, PARAMETERS
from openpulid.world.dataset import FAMILY, Plan, WorldDataset, build_dataset, encode_attributes

PLAN = Plan(people=4, scenes=2, size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def data(folder):
    return build_dataset(folder, PLAN, workers=1, compiled=False)


def test_dataset_arrays(data):
    assert len(data) == 8 and data.images.shape == (8, 3, 32, 32)
    assert data.vectors.shape == (8, len(PARAMETERS)) and data.attributes.shape == (
        8,
        len(ATTRIBUTES),
    )
    assert data.people.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and set(data.families) == {0}
    np.testing.assert_allclose(data.vectors[2], PLAN.person(1).vector(), rtol=1e-6)
    assert data.attributes[5].tolist() == encode_attributes(PLAN.scene(2, 1))


def test_images_show_their_person_and_scene(data):
    from openpulid.world import render

    rendering = render([PLAN.person(1)] * 8, [PLAN.scene(1, 1)] * 8, 32)
    np.testing.assert_allclose(data.images[3], (rendering.image[0] * 255).round().numpy(), atol=1)
    assert data.prompt(3, torch.Generator().manual_seed(0)) == PLAN.scene(1, 1).prompt(
        torch.Generator().manual_seed(0)
    )


def test_second_build_writes_nothing(folder, data):
    names = [file.name for file in folder.iterdir()]
    modified = [(folder / name).stat().st_mtime_ns for name in names]
    build_dataset(folder, PLAN, workers=1, compiled=False)
    assert [(folder / name).stat().st_mtime_ns for name in names] == modified


def test_other_plan_is_rejected(folder, data):
    with pytest.raises(OptionError, match=r"another plan, such as .*--fresh"):
        build_dataset(folder, Plan(people=8, scenes=2, size=32))


def test_plan_without_portraits_field_is_accepted(folder, data):
    plan = json.loads((folder / "plan.json").read_text())
    del plan["portraits"]
    (folder / "plan.json").write_text(json.dumps(plan))
    assert len(build_dataset(folder, PLAN, workers=1, compiled=False)) == len(data)


def test_unfinished_dataset_names_build_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="pulid mini build world"):
        WorldDataset.open(tmp_path)
    assert FAMILY == 4


SCRIPT = """
import signal
import sys
from openpulid.world.dataset import Plan, build_dataset

if __name__ == "__main__":
    # a shell lets its background jobs ignore the signal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        build_dataset(
            sys.argv[1],
            Plan(people=800, scenes=4, size=32),
            workers=1,
            compiled=False,
            on_progress=lambda done, total: print(done, flush=True),
        )
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_interrupt_stops_the_workers_quietly(tmp_path):
    """A terminal sends Ctrl-C to the workers as well."""
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "world"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "8"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "interrupted" and process.returncode == 0
    assert "Traceback" not in err and "Error" not in err, err
    assert len((tmp_path / "world" / "rendered.txt").read_text().split()) < 800
