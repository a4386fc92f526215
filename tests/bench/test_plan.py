"""Tests of the files that a run needs: `--preset` and `--plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from openpulid.bench.methods import select_presets
from openpulid.bench.plan import (
    METRICS,
    OPTIONAL_METRICS,
    list_needed_files,
    select_available,
)
from openpulid.bench.run_dir import BASE
from openpulid.bench.suite import load_suite
from openpulid.cli.main import app
from openpulid.errors import OptionError
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS
from openpulid.pipelines.presets import MINIATURE

SUITE = load_suite("miniature")
RunBench = Callable[..., Result]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunBench:
    """Run `pulid bench run` where no published file is installed, except those in `weights`."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*arguments: object) -> Result:
        words = ["bench", "run", *map(str, arguments), "-o", str(tmp_path / "run")]
        return CliRunner().invoke(app, words)

    return run


def test_suite_of_the_miniature_keeps_only_its_prompts_on_other_presets() -> None:
    suite = SUITE.with_preset("sdxl")
    assert suite.preset == "sdxl" and not suite.uses_miniature and suite.num_people == 0
    assert [prompt.text for prompt in suite.prompts] == [prompt.text for prompt in SUITE.prompts]
    assert not any(prompt.attributes for prompt in suite.prompts)
    assert suite.seeds == SUITE.seeds
    # the batches of the miniature would not fit into the memory of a GPU at full size
    assert replace(SUITE, batch_size=12).with_preset("sdxl").batch_size == 1
    few_steps = SUITE.with_preset("mini-lightning")
    assert few_steps.num_people == SUITE.num_people and few_steps.prompts == SUITE.prompts
    assert SUITE.with_preset("mini") == SUITE
    trained = SUITE.with_preset(str(MINIATURE))  # a directory of a trained miniature
    assert trained.uses_miniature and trained.num_people == SUITE.num_people


def test_published_values_are_left_out_on_another_preset() -> None:
    paper = load_suite("pulid-paper")
    assert paper.with_preset("sdxl").published == {}
    assert paper.with_preset(paper.preset) is paper
    assert paper.with_preset("flux").prompts == paper.prompts
    with pytest.raises(OptionError, match=r"pulid-paper is for photos.*suite miniature or quick"):
        paper.with_preset("mini")
    with pytest.raises(OptionError, match="no preset 'sdlx'"):
        paper.with_preset("sdlx")


def test_needed_files_name_their_users() -> None:
    suite = SUITE.with_preset("sdxl").with_recognition("sface")
    presets = select_presets(suite, ["pulid", "instantid", "lora"], [0.3])
    users = {file.name: file.users for file in list_needed_files(suite, presets)}
    assert users["juggernaut"] == (BASE, "pulid", "instantid", "lora")
    assert users["pulid-v1.1"] == (BASE, "pulid")
    assert users["eva"] == (BASE, "pulid", "instantid")
    assert users["instantid"] == users["identitynet"] == ("instantid",)
    assert users["scorer-sface"] == users["yunet"] == (METRICS,)
    assert users["scorer-clip"] == (OPTIONAL_METRICS,)
    assert "scorer-recognition" not in users
    assert list_needed_files(SUITE, select_presets(SUITE, ["pulid", "faceid"])) == []


def test_unsupported_methods_are_left_out_of_a_plan() -> None:
    flux = SUITE.with_preset("flux")
    presets, problems = select_available(flux, ["pulid", "faceid", "infiniteyou", "lora"])
    assert list(presets) == [BASE, "pulid", "infiniteyou"]
    assert len(problems) == 2 and "faceid is only available for SDXL presets" in problems[0]
    with pytest.raises(OptionError, match="no method 'magic'"):
        select_available(flux, ["magic"])


def test_plan_prints_files_with_license_size_and_command(bench: RunBench, tmp_path: Path) -> None:
    detector = tmp_path / "weights" / WEIGHTS["scorer-lpips"].file
    detector.parent.mkdir()
    detector.write_bytes(b"installed")
    result = bench(
        "miniature", "--methods", "pulid,faceid,face0", "--preset", "sdxl", "--plan"
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    table = {cells[0]: cells for line in lines if len(cells := line.split("\t")) > 1}
    assert table["name"] == [
        "name", "file", "MB", "license", "sha256", "installed", "needed by"
    ]  # fmt: skip
    entry = WEIGHTS["faceid"]
    cells = table["faceid"]
    assert cells[1:3] == [entry.name, str(entry.megabytes)]
    assert cells[3] == f"{entry.license} (not commercial)" and cells[5:] == ["-", "faceid"]
    assert table["scorer-lpips"][5:] == [str(detector), OPTIONAL_METRICS]
    assert table["juggernaut"][6] == "base, pulid, faceid"
    (command,) = [line for line in lines if "pulid weights get" in line]
    assert " faceid " in command and "scorer-clip" in command and "scorer-lpips" not in command
    assert "scorer-recognition" not in command
    assert "get CurricularFace_Backbone.pth from https://" in result.output
    assert "or use --recognition sface" in result.output
    assert (
        "Left out: no weights of face0 for SDXL have been published; name a file of your own, "
        "face0:FILE, or leave the method out." in " ".join(result.output.split())
    )
    assert "--adapter" not in result.output
    assert not (tmp_path / "run").exists()


def test_plan_of_the_miniature_needs_no_published_file(bench: RunBench) -> None:
    result = bench("miniature", "--methods", "pulid,faceid", "--plan")
    assert (result.exit_code, result.output) == (0, "No published file is missing.\n")


def test_files_are_printed_before_an_incomplete_run_is_refused(
    bench: RunBench, tmp_path: Path
) -> None:
    arguments = ("miniature", "--methods", "pulid,faceid", "--preset", "sdxl")
    result = bench(*arguments)
    assert isinstance(result.exception, OptionError)
    assert "pass a folder of photos with --people" in str(result.exception)
    assert "\nfaceid\t" in result.output and "pulid weights get" in result.output

    people = tmp_path / "people"
    people.mkdir()
    Image.new("RGB", (64, 64)).save(people / "anna.png")
    result = bench(*arguments, "--people", people)
    assert "`pulid weights get juggernaut" in str(result.exception)
    assert "\nfaceid\t" in result.output and "\nscorer-clip\t" in result.output
    result = bench(*arguments, "--people", tmp_path / "none")  # what costs nothing first
    assert "none is not a folder" in str(result.exception) and not result.output
    assert not (tmp_path / "run").exists()
