"""A run of the shipped miniature: killed and resumed, failed and recorded, spread over workers."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from openpulid.bench import generate as run
from openpulid.bench import report, table
from openpulid.bench import score as judging
from openpulid.bench.generate import Worker
from openpulid.bench.metrics import FID
from openpulid.bench.run_dir import BASE, RunDir, SampleKey, Subject, chunks
from openpulid.bench.suite import find_suite
from openpulid.cli import bench as measures
from openpulid.cli.bench import _contest, _entry, _label, _only_complete, _presets
from openpulid.cli.main import app
from openpulid.errors import OptionError, WeightsError
from openpulid.io.hub import FOLDER_VARIABLE
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.mini.evaluation.subjects import synthetic_subjects

SUITE = find_suite("quick")
PEOPLE = synthetic_subjects(SUITE.people, SUITE.first)
PRESETS = _presets(SUITE, ["pulid"])
METHODS = list(PRESETS)


def contest(folder: RunDir, people: list[Subject] = PEOPLE) -> Worker:
    return _contest(SUITE, PRESETS, people, folder, "cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = RunDir(tmp_path_factory.mktemp("run"))
    run.run(SUITE, PRESETS, PEOPLE, folder, run.here(contest(folder)))
    judging.score_run(folder, MiniScorers.load())
    return folder


def without_times(folder: RunDir) -> list[dict[str, object]]:
    rows = table.as_json(folder)["rows"]
    for row in rows:
        for name in ("ratio", *table.COSTS):
            row.pop(name, None)
            row["intervals"].pop(name, None)
    return rows


def test_every_cell_is_there_and_says_how_it_was_made(finished: RunDir) -> None:
    cells = [
        cell for chunk in chunks(SUITE, METHODS, [s.name for s in PEOPLE]) for cell in chunk.cells
    ]
    assert len(cells) == len(set(cells)) == 2 * 3 * 2 * 2
    for cell in cells:
        record = finished.record(cell)
        assert record is not None and record["status"] == "done" and finished.image(cell).is_file()
        assert (
            record["configuration"]["steps"] == 4
            and record["seconds"] > 0
            and record["versions"]["torch"]
        )
    base, pulid = table.as_json(finished)["rows"]
    assert (base["clip_i"], base["outside_face"], base["ratio"]) == (pytest.approx(1), 0, 1)
    assert (
        pulid["clip_i"] < 1 and pulid["outside_face"] > 0 and pulid["ratio"] > 0 and "fid" in pulid
    )
    assert pulid["images"] == 12 and pulid["failed"] == 0


def test_methods_take_turns() -> None:
    order = [chunk.cells[0].method for chunk in chunks(SUITE, METHODS, ["a", "b"])]
    assert order == METHODS * 4


def test_a_killed_run_ends_with_the_same_table(finished: RunDir, tmp_path: Path) -> None:
    folder = RunDir(tmp_path)

    def kill(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(SUITE, PRESETS, PEOPLE, folder, run.here(contest(folder)), kill)
    made = [
        folder.image(cell)
        for cell in judging.sample_keys(folder.facts(), BASE)
        if folder.done(cell)
    ]
    assert 0 < len(made) < 6 * 2
    before = made[0].stat().st_mtime_ns
    run.run(SUITE, PRESETS, PEOPLE, folder, run.here(contest(folder)))
    judging.score_run(folder, MiniScorers.load())
    assert made[0].stat().st_mtime_ns == before  # nothing is made twice
    assert without_times(folder) == without_times(finished)


def test_judging_that_is_stopped_ends_with_the_same(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    folder, judges = RunDir(tmp_path / "run"), MiniScorers.load()
    facts, names = folder.facts(), [measure.name for measure in judges.measures()]
    for cell in [cell for method in METHODS for cell in judging.sample_keys(facts, method)]:
        record = folder.record(cell) or {}
        folder.keep(
            cell, {name: told for name, told in record.items() if name not in ("metrics", "asked")}
        )

    def stop(measure: FID) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FID, "compute", stop)
        judging.score_run(folder, judges)
    assert judging.known_sets(folder) == {
        BASE: {}
    }  # what was known of pulid was of images before these
    assert not judging.unmeasured(folder, facts, "pulid", names) and judging.unmeasured(
        folder, facts, "pulid", names, ["fid"]
    )
    judging.score_run(folder, judges)
    assert judging.known_sets(folder) == judging.known_sets(finished)
    (folder.path / "sets.json").write_text(
        json.dumps({BASE: {}, "pulid": {"fid": None}})
    )  # it cannot be told
    assert not judging.unmeasured(
        folder, facts, "pulid", names, ["fid"]
    ) and "fid" not in table.markdown(folder)


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder, people = (
        RunDir(tmp_path),
        [Subject("nobody", Image.new("RGB", (96, 96), "gray")), PEOPLE[0]],
    )
    run.run(SUITE, PRESETS, people, folder, run.here(contest(folder, people)))
    judging.score_run(folder, MiniScorers.load())
    seed = SUITE.seeds[0]
    failed = folder.record(SampleKey("pulid", "nobody", 0, seed))
    assert (
        failed is not None
        and failed["status"] == "failed"
        and "no face was found" in failed["error"]
    )
    base, pulid = table.as_json(folder)["rows"]
    assert (pulid["images"], pulid["failed"], base["failed"]) == (4, 4, 0)
    assert "no face was found" in table.markdown(folder)


def test_a_folder_keeps_to_its_suite(finished: RunDir) -> None:
    with pytest.raises(OptionError, match="another suite or other people"):
        finished.begin(find_suite("miniature"), METHODS, PEOPLE)
    finished.begin(
        replace(SUITE, published={"a paper": {}}), METHODS, PEOPLE
    )  # more numbers beside it
    finished.begin(SUITE, [BASE, "pulid"], PEOPLE)  # the same again is welcome
    with pytest.raises(OptionError, match="holds no run"):
        RunDir(finished.path / "people").facts()


def test_the_report_is_one_page_that_can_be_mailed(finished: RunDir) -> None:
    pytest.importorskip("matplotlib")
    names = {file.name for file in report.write(finished)}
    assert names == {"report.md", "report.json", "report.html", "report.png", "faces.jpg"}
    assert (
        Image.open(finished.path / "faces.jpg").width == 2 * 24 + 3 * (176 + 16) - 16
    )  # given, base, pulid
    page = (finished.path / "report.html").read_text("utf-8")
    assert page.count("data:image/png") == 1 + 3 * (1 + 2 * 2) and 'src="http' not in page
    assert json.loads((finished.path / "report.json").read_text())["suite"] == "quick"
    text = table.markdown(finished)
    assert "| pulid | 12 |" in text and "face_sim ↑" in text and "outside_face ↓" in text
    assert "seconds" not in text and "time to base" in text  # this is a processor
    assert "fid is the Frechet distance" in page and "by features of CLIP" in text


def test_a_report_of_one_person_tells_no_interval(finished: RunDir, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = RunDir(tmp_path)
    folder.begin(SUITE, METHODS, PEOPLE[:1])
    for cell in [
        cell for method in METHODS for cell in judging.sample_keys(folder.facts(), method)
    ]:
        folder.keep(cell, finished.record(cell) or {}, Image.open(finished.image(cell)))
    assert "report.png" in {file.name for file in report.write(folder)}

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    rows = json.loads((tmp_path / "report.json").read_text("utf-8"), parse_constant=refuse)["rows"]
    assert all(row["intervals"] == {} for row in rows) and rows[1]["clip_i"] < 1
    text = table.markdown(folder)
    assert "±" not in text and "nan" not in text


def test_large_pictures_are_small_on_the_page(finished: RunDir, tmp_path: Path) -> None:
    folder, name = RunDir(tmp_path), PEOPLE[0].name
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    )
    folder.begin(SUITE, METHODS, [Subject(name, noise)])
    for cell in [
        SampleKey(method, name, prompt, SUITE.seeds[0]) for method in METHODS for prompt in range(2)
    ]:
        folder.keep(cell, finished.record(cell) or {}, noise)
    page = report.page(folder, None)
    assert (
        page.count("data:image/jpeg") == 1 + 2 * 2
        and "image/png" not in page
        and len(page) < 500_000
    )


def test_a_report_without_judges_says_so(
    finished: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(*known: object) -> MiniScorers:
        raise WeightsError("no finder.")

    shutil.copytree(finished.path, tmp_path / "run")
    monkeypatch.setattr(measures, "_judges", missing)
    measures.report_run(tmp_path / "run", as_json=True)
    told = capsys.readouterr()
    assert json.loads(told.out) == table.as_json(finished) and not told.err
    measures.report_run(tmp_path / "run")
    assert "nothing more is measured: no finder." in capsys.readouterr().err


def test_what_prompts_ask_for_is_told_by_attribute(finished: RunDir) -> None:
    heads, lines = table.asked(finished) or ([], [])
    assert f"<details><summary>{table.ASKED}" in report.page(finished, None)
    assert heads == ["asked for", "images", *METHODS] and f"## {table.ASKED}" in table.markdown(
        finished
    )
    asked = [prompt.wanted for prompt in SUITE.prompts]
    pairs = sorted({pair for wanted in asked for pair in wanted.items()})
    assert [line[0] for line in lines] == [
        f"{name}: {value}".replace("_", " ") for name, value in pairs
    ]
    photos = []
    for cell in judging.sample_keys(finished.facts(), "pulid"):
        record = finished.record(cell) or {}
        assert set(record["asked"]) == set(asked[cell.prompt])
        assert record["metrics"]["attributes"] == pytest.approx(
            sum(record["asked"].values()) / len(record["asked"]), abs=1e-5
        )
        photos += [record["asked"]["style"]] if asked[cell.prompt]["style"] == "photo" else []
    told = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    assert told["style: photo"]["pulid"] == f"{sum(photos) / len(photos):.3f}"
    assert told["style: photo"]["images"] == str(len(photos))
    names = ["attributes"]
    assert not judging.unmeasured(finished, finished.facts(), "pulid", names)
    cell = judging.sample_keys(finished.facts(), "pulid")[0]
    known = finished.record(cell) or {}
    finished.keep(
        cell,
        {name: told for name, told in known.items() if name != "asked"},
        Image.open(finished.image(cell)),
    )
    assert judging.unmeasured(
        finished, finished.facts(), "pulid", names
    )  # one of a run that was judged before the table
    finished.keep(cell, known, Image.open(finished.image(cell)))


def test_costs_are_what_the_records_say(finished: RunDir, tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.begin(SUITE, METHODS, PEOPLE)
    for method, seconds, identify in ((BASE, 2.0, 0.0), ("pulid", 3.0, 0.5)):
        for cell in judging.sample_keys(folder.facts(), method):
            known = {
                "seconds": seconds,
                "identify_seconds": identify,
                "memory": 1.5,
                "hardware": "an accelerator",
            }
            folder.keep(
                cell, (finished.record(cell) or {}) | known, Image.open(finished.image(cell))
            )
    _, pulid = table.as_json(folder)["rows"]
    assert [pulid[name] for name in table.COSTS] == [3.0, round(4 / 3, 5), 3.5, 1.5] and pulid[
        "ratio"
    ] == 1.5
    assert all(f"{name} " in table.markdown(folder) for name in table.COSTS)


def test_times_of_other_starts_and_machines_do_not_compare(
    finished: RunDir, tmp_path: Path
) -> None:
    folder = RunDir(tmp_path)
    folder.begin(SUITE, METHODS, PEOPLE)
    plain, (first, *rest) = (judging.sample_keys(folder.facts(), method) for method in METHODS)

    def keep(cell: SampleKey, seconds: float, start: str, hardware: str = "cpu") -> None:
        folder.keep(
            cell,
            (finished.record(cell) or {})
            | {"seconds": seconds, "start": start, "hardware": hardware},
        )

    def ratio() -> float | None:
        told: float | None = table.as_json(folder)["rows"][1]["ratio"]
        return told

    for cell in plain:
        keep(cell, 2.0, "first")
    for cell in (first, *rest):
        keep(cell, 3.0, "first")
    assert ratio() == 1.5
    for cell in rest:  # as of a run that was stopped, or of a method that joined later
        keep(cell, 9.0, "second")
    assert ratio() == 1.5
    keep(first, 3.0, "first", "another cpu")
    assert ratio() is None and [line[-1] for line in table.told(folder)[1]] == ["1.00", ""]


def test_methods_at_several_scales_are_one_curve() -> None:
    assert _entry("instantid:a/b.safetensors@0.5") == ("instantid", Path("a/b.safetensors"), 0.5)
    assert _entry("faceid:my@home.bin") == ("faceid", Path("my@home.bin"), None)
    assert [_label(name) for name in ("pulid", "pulid@0.50", "faceid:x/mine.bin")] == [
        "pulid",
        "pulid@0.5",
        "mine",
    ]
    with pytest.raises(OptionError, match="METHOD@SCALE"):
        _entry("pulid@much")
    rows = [
        table.Row(name, {}, 1, 0, 1.0, scale, ())
        for name, scale in (("pulid", 0.7), ("other", 1.0), ("pulid@0.4", 0.4))
    ]
    assert [[row.method for row in curve] for curve in report._curves(rows)] == [
        ["pulid@0.4", "pulid"],
        ["other"],
    ]


def test_a_row_has_one_name() -> None:
    with pytest.raises(OptionError, match="are named mine"):
        _presets(SUITE, ["pulid:a/mine.safetensors", "faceid:b/mine.safetensors"])
    with pytest.raises(OptionError, match="are named base"):
        _presets(SUITE, ["pulid:base.safetensors"])


def test_what_is_missing_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "run"
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchmetrics", None)
        for command in (
            partial(measures.run_suite, "quick", place),
            partial(measures.report_run, place),
        ):
            with pytest.raises(
                OptionError, match=r"needs torchmetrics: pip install 'openpulid\[bench\]'"
            ):
                command()
    with pytest.raises(OptionError, match=r"typo\.bin is not there"):
        measures.run_suite("quick", place, methods="pulid,faceid:typo.bin")
    lost = {**PRESETS, "lost": PRESETS["pulid"].with_models(adapter=tmp_path / "none.safetensors")}
    with pytest.raises(WeightsError, match=r"none\.safetensors is not there; `pulid mini build`"):
        _only_complete(lost)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(WeightsError, match=r"`pulid weights get sdxl-base .*instantid identitynet"):
        _only_complete(_presets(find_suite("pulid-paper"), ["instantid"]))
    with pytest.raises(OSError):
        run.run(SUITE, lost, PEOPLE, RunDir(place), lambda chunks: chunks)
    assert not place.exists()


def test_the_command_and_methods_on_one_pipeline(finished: RunDir, tmp_path: Path) -> None:
    """FaceID beside it changes nothing of PuLID's images; the report measures what a stopped run left."""
    asked = [
        "bench",
        "run",
        "quick",
        "--methods",
        "pulid,faceid",
        "--count",
        "1",
        "-o",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    folder, cells = RunDir(tmp_path), {}
    for method in (BASE, "pulid", "faceid"):
        (cells[method], *_) = judging.sample_keys(folder.facts(), method)
        images = [
            folder.image(cell).read_bytes() for cell in judging.sample_keys(folder.facts(), method)
        ]
        if method != "faceid":
            assert images == [
                finished.image(cell).read_bytes()
                for cell in judging.sample_keys(folder.facts(), method)
            ]
    rows = table.as_json(folder)["rows"]
    _, pulid, faceid = rows
    starts = {
        (folder.record(cell) or {})["start"]
        for method in cells
        for cell in judging.sample_keys(folder.facts(), method)
    }
    assert len(starts) == 1 and None not in starts
    assert (
        faceid["images"] == 4 and faceid["clip_i"] < 1 and faceid["face_sim"] != pulid["face_sim"]
    )
    record = folder.record(cells["faceid"]) or {}
    folder.keep(
        cells["faceid"], {name: value for name, value in record.items() if name != "metrics"}
    )
    (tmp_path / "sets.json").unlink()
    assert CliRunner().invoke(app, ["bench", "report", str(tmp_path)]).exit_code == 0
    assert table.as_json(folder)["rows"] == rows


def test_two_workers_make_the_same_table(finished: RunDir, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from openpulid.bench.ray_backend import ray_executor

    folder = RunDir(tmp_path)
    run.run(SUITE, PRESETS, PEOPLE, folder, ray_executor(lambda: contest(folder), "2"))
    judging.score_run(folder, MiniScorers.load())
    assert without_times(folder) == without_times(finished)
