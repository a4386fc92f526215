"""A run of the shipped miniature: killed and resumed, failed and recorded, spread over workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from openpulid.apps.cli import app
from openpulid.apps.measures import _contest, _entry, _label, _presets
from openpulid.bench import judging, report, run, table
from openpulid.bench.cells import BASE, Cell, Chunk, Folder, Sitter, chunks
from openpulid.bench.run import Contest
from openpulid.bench.suite import find
from openpulid.errors import OptionError
from openpulid.mini.judge import Judges
from openpulid.mini.sitters import sitters

SUITE = find("quick")
PEOPLE = sitters(SUITE.people, SUITE.first)
PRESETS = _presets(SUITE, ["pulid"])
METHODS = list(PRESETS)


def contest(folder: Folder, people: list[Sitter] = PEOPLE) -> Contest:
    return _contest(SUITE, PRESETS, people, folder, "cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("run"))
    run.run(SUITE, PRESETS, PEOPLE, folder, run.here(contest(folder)))
    judging.judge(folder, Judges.load())
    return folder


def without_times(folder: Folder) -> list[dict[str, object]]:
    rows = table.as_json(folder)["rows"]
    for row in rows:
        for name in ("ratio", *table.COSTS):
            row.pop(name, None)
            row["intervals"].pop(name, None)
    return rows


def test_every_cell_is_there_and_says_how_it_was_made(finished: Folder) -> None:
    cells = [cell for chunk in chunks(SUITE, METHODS, [s.name for s in PEOPLE]) for cell in chunk.cells]
    assert len(cells) == len(set(cells)) == 2 * 3 * 2 * 2
    for cell in cells:
        record = finished.record(cell)
        assert record is not None and record["status"] == "done" and finished.image(cell).is_file()
        assert record["configuration"]["steps"] == 4 and record["seconds"] > 0 and record["versions"]["torch"]
    base, pulid = table.as_json(finished)["rows"]
    assert (base["clip_i"], base["outside_face"], base["ratio"]) == (pytest.approx(1), 0, 1)
    assert pulid["clip_i"] < 1 and pulid["outside_face"] > 0 and pulid["ratio"] > 0 and "fid" in pulid
    assert pulid["images"] == 12 and pulid["failed"] == 0


def test_methods_take_turns() -> None:
    order = [chunk.cells[0].method for chunk in chunks(SUITE, METHODS, ["a", "b"])]
    assert order == METHODS * 4


def test_a_killed_run_ends_with_the_same_table(finished: Folder, tmp_path: Path) -> None:
    folder = Folder(tmp_path)

    def kill(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(SUITE, PRESETS, PEOPLE, folder, run.here(contest(folder)), kill)
    made = [folder.image(cell) for cell in judging.cells_of(folder.facts(), BASE) if folder.done(cell)]
    assert 0 < len(made) < 6 * 2
    before = made[0].stat().st_mtime_ns
    run.run(SUITE, PRESETS, PEOPLE, folder, run.here(contest(folder)))
    judging.judge(folder, Judges.load())
    assert made[0].stat().st_mtime_ns == before  # nothing is made twice
    assert without_times(folder) == without_times(finished)


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder, people = Folder(tmp_path), [Sitter("nobody", Image.new("RGB", (96, 96), "gray")), PEOPLE[0]]
    run.run(SUITE, PRESETS, people, folder, run.here(contest(folder, people)))
    judging.judge(folder, Judges.load())
    seed = SUITE.seeds[0]
    failed = folder.record(Cell("pulid", "nobody", 0, seed))
    assert failed is not None and failed["status"] == "failed" and "no face was found" in failed["error"]
    base, pulid = table.as_json(folder)["rows"]
    assert (pulid["images"], pulid["failed"], base["failed"]) == (4, 4, 0)
    assert "no face was found" in table.markdown(folder)


def test_a_folder_keeps_to_its_suite(finished: Folder) -> None:
    with pytest.raises(OptionError, match="another suite or other people"):
        finished.begin(find("miniature"), METHODS, PEOPLE)
    finished.begin(SUITE, [BASE, "pulid"], PEOPLE)  # the same again is welcome
    with pytest.raises(OptionError, match="holds no run"):
        Folder(finished.path / "people").facts()


def test_the_report_is_one_page_that_can_be_mailed(finished: Folder) -> None:
    pytest.importorskip("matplotlib")
    names = {file.name for file in report.write(finished)}
    assert names == {"report.md", "report.json", "report.html", "report.png", "faces.jpg"}
    assert Image.open(finished.path / "faces.jpg").width == 2 * 24 + 3 * (176 + 16) - 16  # given, base, pulid
    page = (finished.path / "report.html").read_text("utf-8")
    assert page.count("data:image/png") == 1 + 3 * (1 + 2 * 2) and 'src="http' not in page
    assert json.loads((finished.path / "report.json").read_text())["suite"] == "quick"
    text = table.markdown(finished)
    assert "| pulid | 12 |" in text and "face_sim ↑" in text and "outside_face ↓" in text
    assert "seconds" not in text and "time to base" in text  # this is a processor


def test_what_prompts_ask_for_is_told_by_attribute(finished: Folder) -> None:
    heads, lines = table.asked(finished) or ([], [])
    assert heads == ["asked for", *METHODS] and f"## {table.ASKED}" in table.markdown(finished)
    asked = [prompt.wanted for prompt in SUITE.prompts]
    assert [line[0].replace(" ", "_") for line in lines] == sorted({name for wanted in asked for name in wanted})
    style = []
    for cell in judging.cells_of(finished.facts(), "pulid"):
        record = finished.record(cell) or {}
        assert set(record["asked"]) == set(asked[cell.prompt])
        assert record["metrics"]["attributes"] == pytest.approx(sum(record["asked"].values()) / len(record["asked"]), abs=1e-5)
        style.append(record["asked"]["style"])
    told = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    assert told["style"]["pulid"] == f"{sum(style) / len(style):.3f}"


def test_costs_are_what_the_records_say(finished: Folder, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.begin(SUITE, METHODS, PEOPLE)
    for method, seconds, identify in ((BASE, 2.0, 0.0), ("pulid", 3.0, 0.5)):
        for cell in judging.cells_of(folder.facts(), method):
            known = {"seconds": seconds, "identify_seconds": identify, "memory": 1.5, "hardware": "an accelerator"}
            folder.keep(cell, (finished.record(cell) or {}) | known, Image.open(finished.image(cell)))
    _, pulid = table.as_json(folder)["rows"]
    assert [pulid[name] for name in table.COSTS] == [3.0, round(4 / 3, 5), 3.5, 1.5] and pulid["ratio"] == 1.5
    assert all(f"{name} " in table.markdown(folder) for name in table.COSTS)


def test_methods_at_several_scales_are_one_curve() -> None:
    assert _entry("instantid:a/b.safetensors@0.5") == ("instantid", Path("a/b.safetensors"), 0.5)
    assert _entry("faceid:my@home.bin") == ("faceid", Path("my@home.bin"), None)
    assert [_label(name) for name in ("pulid", "pulid@0.50", "faceid:x/mine.bin")] == ["pulid", "pulid@0.5", "mine"]
    with pytest.raises(OptionError, match="METHOD@SCALE"):
        _entry("pulid@much")
    rows = [table.Row(name, {}, 1, 0, 1.0, scale, ()) for name, scale in (("pulid", 0.7), ("other", 1.0), ("pulid@0.4", 0.4))]
    assert [[row.method for row in curve] for curve in report._curves(rows)] == [["pulid@0.4", "pulid"], ["other"]]


def test_a_row_has_one_name() -> None:
    with pytest.raises(OptionError, match="both be called mine"):
        _presets(SUITE, ["pulid:a/mine.safetensors", "faceid:b/mine.safetensors"])
    with pytest.raises(OptionError, match="both be called base"):
        _presets(SUITE, ["pulid:base.safetensors"])


def test_what_was_made_otherwise_is_made_again(finished: Folder, tmp_path: Path) -> None:
    """Another file, another scale: an old image is no image of them."""
    shutil.copytree(finished.path, tmp_path / "run")
    folder, asked = Folder(tmp_path / "run"), []

    def spread(chunks: Iterable[Chunk]) -> Iterable[Chunk]:
        asked.extend(chunks)
        return ()

    run.run(SUITE, PRESETS, PEOPLE, folder, spread)
    assert asked == []
    stage1 = PRESETS["pulid"].adapter.with_name("pulid-stage1.safetensors")
    for other in (replace(PRESETS["pulid"], scale=0.5), replace(PRESETS["pulid"], adapter=stage1)):
        asked.clear()
        run.run(SUITE, {**PRESETS, "pulid": other}, PEOPLE, folder, spread)
        assert {cell.method for chunk in asked for cell in chunk.cells} == {"pulid"} and len(asked) == 3 * 2
    with pytest.raises(OptionError, match="another picture"):
        folder.begin(SUITE, METHODS, [replace(sitter, portrait=PEOPLE[0].portrait) for sitter in PEOPLE])


def test_the_command_and_methods_on_one_pipeline(finished: Folder, tmp_path: Path) -> None:
    """FaceID beside it changes nothing of PuLID's images; the report measures what a stopped run left."""
    asked = ["bench", "run", "quick", "--methods", "pulid,faceid", "--count", "1", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    folder, cells = Folder(tmp_path), {}
    for method in (BASE, "pulid", "faceid"):
        (cells[method], *_) = judging.cells_of(folder.facts(), method)
        images = [folder.image(cell).read_bytes() for cell in judging.cells_of(folder.facts(), method)]
        if method != "faceid":
            assert images == [finished.image(cell).read_bytes() for cell in judging.cells_of(folder.facts(), method)]
    _, pulid, faceid = table.as_json(folder)["rows"]
    assert faceid["images"] == 4 and faceid["clip_i"] < 1 and faceid["face_sim"] != pulid["face_sim"]
    record = folder.record(cells["faceid"]) or {}
    folder.keep(cells["faceid"], {name: value for name, value in record.items() if name != "metrics"})
    (tmp_path / "sets.json").unlink()
    assert CliRunner().invoke(app, ["bench", "report", str(tmp_path)]).exit_code == 0
    assert table.as_json(folder)["rows"][2] == faceid


def test_two_workers_make_the_same_table(finished: Folder, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from openpulid.bench.workers import over_ray

    folder = Folder(tmp_path)
    run.run(SUITE, PRESETS, PEOPLE, folder, over_ray(lambda: contest(folder), "2"))
    judging.judge(folder, Judges.load())
    assert without_times(folder) == without_times(finished)
