"""The order of the build, its minutes, its report."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from openpulid.errors import OptionError, WeightsError
from openpulid.mini.models.pipeline import save_folder
from openpulid.mini.train import build as builder
from openpulid.mini.train import stages as parts
from tests.support import mini_networks as networks


@pytest.fixture
def folders(tmp_path):
    return {
        "runs": tmp_path / "runs",
        "weights": tmp_path / "weights",
        "report": tmp_path / "report.json",
    }


@pytest.fixture
def made(monkeypatch):
    """Three parts that only note how they were called."""
    called = []

    def part(name):
        return lambda shop: called.append((name, shop.minutes)) or {"figure": len(called) / 10}

    minutes = {"world": 1, "finder": 2, "base": 6}
    monkeypatch.setattr(
        builder, "PARTS", {name: (part(name), value) for name, value in minutes.items()}
    )
    return called


def test_parts_run_in_their_order_and_share_the_minutes(made, folders):
    figures = builder.build(["base", "finder"], minutes=16, device="cpu", **folders)
    assert made == [("finder", 4.0), ("base", 12.0)]
    assert figures == {"finder": {"figure": 0.1}, "base": {"figure": 0.2}}


def test_without_names_everything_is_made_in_its_usual_minutes(made, folders):
    builder.build(device="cpu", **folders)
    assert made == [("world", 1), ("finder", 2), ("base", 6)]


def test_an_unknown_part_is_named_before_anything_runs(made, folders):
    with pytest.raises(OptionError, match=r"'eyes'.*world, finder, base"):
        builder.build(["world", "eyes"], **folders)
    assert made == []


def test_fresh_forgets_what_was_begun(made, folders):
    for name in ("world", "finder"):
        (folders["runs"] / name).mkdir(parents=True)
    builder.build(["finder"], device="cpu", fresh=True, **folders)
    assert [path.name for path in folders["runs"].iterdir()] == ["world"]


def test_figures_are_appended_to_the_report(made, folders):
    for _ in range(2):
        builder.build(["finder"], minutes=3, device="cpu", **folders)
    measurements = json.loads(folders["report"].read_text())["measurements"]
    assert [measurement["name"] for measurement in measurements] == ["finder"] * 2
    assert measurements[0]["command"] == "pulid mini build finder --minutes 3"
    assert measurements[0]["figures"] == {"figure": 0.1}


def test_a_part_that_comes_too_early_says_so(folders):
    shop = parts.BuildContext(folders["runs"], folders["weights"], torch.device("cpu"))
    with pytest.raises(WeightsError, match="pulid mini build"):
        shop.words()


def test_a_stamp_leaves_the_weights_alone(tmp_path):
    unet = networks.small_unet()
    save_folder(unet, tmp_path)
    parts.stamp(tmp_path, {"revision": "abc", "seed": 4})
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "revision": "abc", "seed": "4"}
        assert torch.equal(file.get_tensor("conv_in.weight"), unet.conv_in.weight.bfloat16())
