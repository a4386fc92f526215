"""`pulid data`: options and errors; `tests/data_preparation` prepares datasets."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from openpulid.cli import data
from openpulid.cli.main import app
from openpulid.data.options import MINI_OPTIONS, Filters, PrepareOptions
from openpulid.errors import OptionError, TrainingError


def run(*words: str | Path) -> Exception | None:
    result = CliRunner().invoke(app, ["data", *map(str, words)])
    error = result.exception
    assert error is None or isinstance(error, Exception)
    return error


def test_every_option_of_a_dataset_has_one_of_the_command() -> None:
    parameters = get_command(data.data).commands["prepare"].params
    names = {parameter.name for parameter in parameters}
    wanted = {field.name for field in (*fields(PrepareOptions), *fields(Filters))} - {"filters"}
    assert wanted <= names
    # the help states the defaults
    options = {parameter.name: parameter.help for parameter in parameters}
    for field in (*fields(PrepareOptions), *fields(Filters)):
        if isinstance(field.default, (int, float)) and field.name not in ("replace_captions",):
            assert f"{field.default:g}" in options[field.name], field.name


def test_options_of_the_command_line_are_passed_on() -> None:
    options = data._choose_options({"faces": "mini", "max_yaw": 30.0, "quality": 80})
    assert options.filters.max_yaw == 30 and options.quality == 80
    assert options.filters.min_face == MINI_OPTIONS.filters.min_face
    assert data._choose_options({"faces": ""}) == PrepareOptions()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-yaw", "100"], "--max-yaw must be from 0 to 90, got 100"),
        (["--batch", "0"], "--batch must be from 1 to 4096, got 0"),
        (["--workers", "2", "--ray", "auto"], "--workers is for this machine"),
        (["--ray", "host"], "--ray host: expected local, auto or HOST:PORT"),
        ([], "missing does not exist; name a folder of images"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path: Path, words: list[str], message: str) -> None:
    out = tmp_path / "data"
    error = run("prepare", tmp_path / "missing", "-o", out, "--faces", "mini", *words)
    assert isinstance(error, OptionError) and message in str(error)
    assert not out.exists()


def test_report_of_no_dataset_is_one_sentence(tmp_path: Path) -> None:
    error = run("report", tmp_path)
    assert isinstance(error, TrainingError) and "is no complete dataset" in str(error)
