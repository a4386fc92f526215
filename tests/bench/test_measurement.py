"""Tests of measurements as self-describing files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from openpulid.bench.measurement import (
    append_measurement,
    describe_measurement,
    replace_measurement,
)
from openpulid.bench.perf import face_analysis
from openpulid.cli.main import app

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_measurement_describes_itself() -> None:
    measurement = describe_measurement(
        {"size": 512}, {"seconds": 1.5}, torch.device("cpu"), command="pulid bench speed"
    )
    assert measurement["command"] == "pulid bench speed"
    assert measurement["configuration"] == {"size": 512}
    assert measurement["figures"] == {"seconds": 1.5}
    assert measurement["hardware"].startswith("cpu") and measurement["revision"]
    assert {"python", "torch", "diffusers"} <= set(measurement["versions"])


def test_command_writes_its_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = face_analysis.Stage("total", 1.0, 4.0)
    monkeypatch.setattr(face_analysis, "measure", lambda *_: [total])
    path = tmp_path / "new" / "identify.json"
    result = CliRunner().invoke(
        app, ["bench", "identify", "--device", "cpu", "--json", "-o", str(path)]
    )
    assert result.exit_code == 0, result.output
    measurement = SimpleNamespace(**json.loads(path.read_text()))
    assert measurement.figures["ratio"] == 0.25
    assert measurement.figures["rows"][0]["name"] == "total"
    assert measurement.configuration["rounds"] == 5
    assert json.loads(result.stdout.splitlines()[-1])["ratio"] == 0.25


def test_measurements_are_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "build.json"
    for name in ("first", "second"):
        measurement = describe_measurement({}, {"x": 1}, torch.device("cpu"), command="pulid")
        append_measurement(path, name, measurement)
    measurements = json.loads(path.read_text())["measurements"]
    assert [measurement["name"] for measurement in measurements] == ["first", "second"]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.json")), ids=lambda path: path.stem)
def test_published_measurements_are_self_describing(path: Path) -> None:
    data = json.loads(path.read_text("utf-8"))
    assert data["about"] and data["measurements"]
    assert path.with_suffix(".md").is_file()
    for measurement in data["measurements"]:
        if "source" in measurement:  # values from a paper
            continue
        assert {"name", "date", "command", "hardware", "versions", "configuration", "figures"} <= (
            set(measurement)
        )


def test_measurement_replaces_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    for name, figures in (("nodes", 1), ("memory", 2), ("nodes", 3)):
        replace_measurement(path, "Data", name, {"figures": figures})
    data = json.loads(path.read_text())
    assert data["about"] == "Data"
    assert [(x["name"], x["figures"]) for x in data["measurements"]] == [
        ("memory", 2),
        ("nodes", 3),
    ]
