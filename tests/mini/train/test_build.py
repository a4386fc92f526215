"""Order, time budgets and report of the miniature's build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from openpulid.cli.main import app
from openpulid.errors import OptionError, WeightsError
from openpulid.mini.models.pipeline import save_folder
from openpulid.mini.train import build as builder
from openpulid.mini.train.baseline_stages import find_baseline_recipe
from openpulid.mini.train.build_context import BuildContext, Stage, stamp
from tests.support import mini_networks as networks


@pytest.fixture
def folders(tmp_path):
    return {
        "runs": tmp_path / "runs",
        "weights": tmp_path / "weights",
        "report": tmp_path / "report.json",
    }


@pytest.fixture
def calls(monkeypatch):
    """Replace the stages by three that record their name and their time budget."""
    recorded = []

    def make_stage(name, minutes):
        def train(context):
            recorded.append((name, context.minutes))
            return {"figure": len(recorded) / 10}

        return Stage(name, minutes, train)

    stages = [make_stage("world", 1), make_stage("detector", 2), make_stage("base", 6)]
    monkeypatch.setattr(builder, "STAGES", stages)
    return recorded


def test_stages_run_in_order_and_share_minutes(calls, folders):
    figures = builder.build(["base", "detector"], minutes=16, device="cpu", **folders)
    assert calls == [("detector", 4.0), ("base", 12.0)]
    assert figures == {"detector": {"figure": 0.1}, "base": {"figure": 0.2}}


def test_all_stages_run_with_usual_minutes_by_default(calls, folders):
    builder.build(device="cpu", **folders)
    assert calls == [("world", 1), ("detector", 2), ("base", 6)]


def test_unknown_stage_fails_before_any_stage_runs(calls, folders):
    with pytest.raises(OptionError, match=r"'eyes'.*world, detector, base"):
        builder.build(["world", "eyes"], **folders)
    assert calls == []


def test_fresh_deletes_earlier_runs_of_the_named_stages(calls, folders):
    for name in ("world", "detector"):
        (folders["runs"] / name).mkdir(parents=True)
    builder.build(["detector"], device="cpu", fresh=True, **folders)
    assert [path.name for path in folders["runs"].iterdir()] == ["world"]


@pytest.mark.parametrize(
    ("stage", "tokens", "deleted"),
    [
        ("world", 36, {"world", "world-held-out", "world-portraits"}),
        ("flux-base", 36, {"flux-base"}),
        ("flux-base", 144, {"flux-base-144"}),
    ],
)
def test_fresh_deletes_what_the_stage_continues(
    tmp_path: Path, stage: str, tokens: int, deleted: set[str]
) -> None:
    names = {"world", "world-held-out", "world-portraits", "flux-base", "flux-base-144", "base"}
    for name in names:
        (tmp_path / name).mkdir()
    (found,) = (one for one in builder.select_stages([stage]) if one.name == stage)
    context = BuildContext(tmp_path, tmp_path, torch.device("cpu"), tokens=tokens)
    found.delete_runs(context)
    assert {path.name for path in tmp_path.iterdir()} == names - deleted


def test_figures_are_appended_to_report(calls, folders):
    for _ in range(2):
        builder.build(["detector"], minutes=3, device="cpu", **folders)
    measurements = json.loads(folders["report"].read_text())["measurements"]
    assert [measurement["name"] for measurement in measurements] == ["detector"] * 2
    assert measurements[0]["command"] == "pulid mini build detector --minutes 3"
    assert measurements[0]["figures"] == {"figure": 0.1}


def test_missing_models_of_earlier_stages_are_reported(folders):
    context = BuildContext(folders["runs"], folders["weights"], torch.device("cpu"))
    with pytest.raises(WeightsError, match="pulid mini build"):
        context.load_text_encoders()


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("photomaker", ["clip-faces"]),
        ("fastcomposer", ["clip-faces"]),
        ("w-plus", ["face-latents"]),
        ("face0", []),
    ],
)
def test_baselines_are_trained_after_what_they_begin_with(name, first):
    assert [stage.name for stage in builder.select_stages([name])] == [*first, name]


def test_stamp_keeps_weights(tmp_path):
    unet = networks.small_unet()
    save_folder(unet, tmp_path)
    stamp(tmp_path, {"revision": "abc", "seed": 4})
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "revision": "abc", "seed": "4"}
        assert torch.equal(file.get_tensor("conv_in.weight"), unet.conv_in.weight.bfloat16())


def test_command_uses_the_weights_of_another_folder(tmp_path: Path) -> None:
    weights = tmp_path / "empty"
    result = CliRunner().invoke(app, ["mini", "build", "lightning", "--weights", str(weights)])
    assert isinstance(result.exception, WeightsError)
    assert str(result.exception).startswith(f"{weights / 'pipeline' / 'text_encoder'} does not")


def test_a_baseline_names_the_stage_whose_steps_it_takes(folders):
    context = BuildContext(folders["runs"], folders["weights"], torch.device("cpu"))
    with pytest.raises(WeightsError, match="`pulid mini build flux-stage1`"):
        find_baseline_recipe(context, "infiniteyou")
