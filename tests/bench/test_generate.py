"""Tests of a run of the shipped miniature: resuming, failures, scoring, reports and workers."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from openpulid.bench import report
from openpulid.bench.equal_similarity import group_curves
from openpulid.bench.generate import Worker, generate_run, local_executor
from openpulid.bench.methods import MethodSpec, check_weights, load_studios, select_presets
from openpulid.bench.metrics import FID, Faces, MetricInputs
from openpulid.bench.run_dir import (
    BASE,
    Job,
    Record,
    Run,
    RunDir,
    SampleKey,
    Subject,
    iterate_jobs,
)
from openpulid.bench.score import load_images, load_references, needs_scoring, score_run
from openpulid.bench.suite import load_suite
from openpulid.bench.table import ALL_COSTS, ATTRIBUTES_TITLE, COSTS, ResultTable, Row
from openpulid.cli import bench as commands
from openpulid.cli.main import app
from openpulid.errors import OptionError, WeightsError
from openpulid.io.hub import FOLDER_VARIABLE
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.mini.evaluation.subjects import synthetic_subjects

SUITE = load_suite("quick")
SUBJECTS = synthetic_subjects(SUITE.num_people, SUITE.first_person)
PRESETS = select_presets(SUITE, ["pulid"])
METHODS = list(PRESETS)


def build_worker(run_dir: RunDir, subjects: list[Subject] = SUBJECTS) -> Worker:
    return Worker(SUITE, load_studios(SUITE, PRESETS, "cpu"), subjects, run_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    generate_run(SUITE, PRESETS, SUBJECTS, run_dir, local_executor(build_worker(run_dir)))
    score_run(run_dir, MiniScorers.load())
    return run_dir


def load_rows(run_dir: RunDir) -> list[dict[str, object]]:
    return ResultTable(run_dir.load()).to_json()["rows"]


def load_rows_without_times(run_dir: RunDir) -> list[dict[str, object]]:
    rows = load_rows(run_dir)
    for row in rows:
        for name in ("ratio", *ALL_COSTS):
            row.pop(name, None)
            row["intervals"].pop(name, None)
    return rows


def load_markdown(run_dir: RunDir) -> str:
    return ResultTable(run_dir.load()).to_markdown()


def read_record(run_dir: RunDir, key: SampleKey) -> Record:
    record = run_dir.read_record(key)
    assert record is not None
    return record


def copy_run(finished: RunDir, path: Path) -> RunDir:
    shutil.copytree(finished.path, path / "run")
    return RunDir(path / "run")


def test_every_image_has_a_complete_record(finished: RunDir) -> None:
    people = [subject.name for subject in SUBJECTS]
    keys = [key for job in iterate_jobs(SUITE, METHODS, people) for key in job.keys]
    assert len(keys) == len(set(keys)) == 2 * 3 * 2 * 2
    for key in keys:
        record = read_record(finished, key)
        assert record.is_done and finished.image_path(key).is_file()
        assert record.configuration["num_inference_steps"] == 4 and record.versions["torch"]
        assert record.seconds is not None and record.seconds > 0
        assert Record.from_json(record.to_json()) == record
    base, pulid = load_rows(finished)
    assert (base["clip_i"], base["outside_face"], base["ratio"]) == (pytest.approx(1), 0, 1)
    assert pulid["clip_i"] < 1 and pulid["outside_face"] > 0 and pulid["ratio"] > 0
    assert "fid" in pulid and pulid["images"] == 12 and pulid["failed"] == 0


def test_methods_are_interleaved() -> None:
    order = [job.keys[0].method for job in iterate_jobs(SUITE, METHODS, ["a", "b"])]
    assert order == METHODS * 4


@pytest.mark.parametrize(
    ("shares_seeds", "expected"),
    [(True, [[3, 5], [3, 5], [3, 5]]), (False, [[3, 5], [6, 8], [9, 11]])],
)
def test_subjects_have_the_same_seeds_or_the_next_ones(
    shares_seeds: bool, expected: list[list[int]]
) -> None:
    suite = replace(SUITE, prompts=SUITE.prompts[:1], seeds=[3, 5], shares_seeds=shares_seeds)
    jobs = list(iterate_jobs(suite, [BASE], ["a", "b", "c"]))
    assert [[key.seed for key in job.keys] for job in jobs] == expected
    run = Run(Path(), suite, ["a", "b", "c"], [BASE], {}, {}, {})
    assert run.keys(BASE) == [key for job in jobs for key in job.keys]
    assert [run.seeds(person) for person in run.people] == expected


def test_batches_equal_single_images(finished: RunDir, tmp_path: Path) -> None:
    """A batch has several prompts of one person and method, and gives equal images."""
    suite = replace(SUITE, batch_size=3)
    jobs = list(iterate_jobs(suite, METHODS, ["a"]))
    assert [len(job.keys) for job in jobs] == [3, 3, 1, 1]
    assert [job.keys[0].method for job in jobs] == METHODS * 2
    run_dir = RunDir(tmp_path)
    worker = Worker(suite, load_studios(suite, PRESETS, "cpu"), SUBJECTS[:1], run_dir)
    for job in iterate_jobs(suite, METHODS, [SUBJECTS[0].name]):
        worker.generate(job)
        together = load_images([run_dir.image_path(key) for key in job.keys])
        alone = load_images([finished.image_path(key) for key in job.keys])
        assert (together - alone).abs().max() <= 1.01 / 255
        records = [read_record(run_dir, key) for key in job.keys]
        assert all(record.is_done and record.seconds for record in records)


def test_a_prompt_that_fails_does_not_fail_its_batch(tmp_path: Path) -> None:
    prompts = (SUITE.prompts[0], replace(SUITE.prompts[1], text="portrait of a unicorn"))
    suite = replace(SUITE, batch_size=2, prompts=prompts, seeds=(1,))
    run_dir = RunDir(tmp_path)
    worker = Worker(suite, load_studios(suite, PRESETS, "cpu"), SUBJECTS[:1], run_dir)
    (job,) = iterate_jobs(suite, ["pulid"], [SUBJECTS[0].name])
    worker.generate(job)
    good, bad = (read_record(run_dir, key) for key in job.keys)
    assert good.is_done and run_dir.image_path(job.keys[0]).exists()
    assert bad.status == "failed" and "does not know 'unicorn'" in (bad.error or "")


def test_methods_come_before_their_extra_scales() -> None:
    methods = [BASE, "lora", "lora@0.3", "lora@0.5", "dreambooth", "dreambooth@0.3"]
    order = [job.keys[0].method for job in iterate_jobs(SUITE, methods, ["a"])]
    expected = [BASE, "lora", "dreambooth", "lora@0.3", "lora@0.5", "dreambooth@0.3"]
    assert order == expected * len(SUITE.prompts)


def test_killed_run_ends_with_the_same_table(finished: RunDir, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)

    def kill(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    executor = local_executor(build_worker(run_dir))
    with pytest.raises(KeyboardInterrupt):
        generate_run(SUITE, PRESETS, SUBJECTS, run_dir, executor, kill)
    run = run_dir.load()
    images = [run.images[key] for key in run.keys(BASE) if key in run.images]
    assert 0 < len(images) < 6 * 2
    modified = images[0].stat().st_mtime_ns
    generate_run(SUITE, PRESETS, SUBJECTS, run_dir, executor)
    score_run(run_dir, MiniScorers.load())
    assert images[0].stat().st_mtime_ns == modified  # no image is generated twice
    assert load_rows_without_times(run_dir) == load_rows_without_times(finished)


def test_stopped_scoring_ends_with_the_same_metrics(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, scorers = copy_run(finished, tmp_path), MiniScorers.load()
    for record in run_dir.load().records.values():
        run_dir.write_record(replace(record, metrics={}, attributes=None))

    def stop(metric: FID) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FID, "compute", stop)
        score_run(run_dir, scorers)
    # the stored FID of pulid was that of earlier images
    assert run_dir.read_method_metrics() == {BASE: {}}
    run = run_dir.load()
    assert all(run.records[key].metrics for key in run.keys("pulid"))
    assert needs_scoring(run, "pulid", scorers)
    score_run(run_dir, scorers)
    assert run_dir.read_method_metrics() == finished.read_method_metrics()
    assert not needs_scoring(run_dir.load(), "pulid", scorers)


def test_shared_features_give_the_same_metrics(finished: RunDir, tmp_path: Path) -> None:
    """As if each metric had applied its networks to the images of one subject alone."""
    scorers = MiniScorers.load()
    batches: list[int] = []

    def detect(images: Tensor) -> Faces:
        batches.append(len(images))
        return scorers.faces(images)

    run_dir = copy_run(finished, tmp_path)
    for record in finished.load().records.values():
        run_dir.write_record(replace(record, metrics={}, attributes=None))
    run_dir.write_method_metrics({})
    score_run(run_dir, replace(scorers, faces=detect))
    # the images of two methods and three subjects, and once those of the base to compare with
    assert batches.count(4) == 2 * 3 + 1
    run = run_dir.load()
    assert run.method_metrics == finished.read_method_metrics()

    person = run.people[1]
    keys = [key for key in run.keys("pulid") if key.person == person]
    images = load_images([run.images[key] for key in keys])
    base_images = load_images([run.images[key.with_method(BASE)] for key in keys])
    references = load_references(run, scorers)
    for metric in scorers.metrics():
        inputs = MetricInputs(
            images=images,
            base_images=base_images,
            faces=scorers.faces(images),
            base_faces=scorers.faces(base_images),
            subjects=torch.ones(len(keys), dtype=torch.long),
            reference_images=references.images,
            reference_faces=references.faces,
            prompts=[SUITE.prompts[key.prompt].text for key in keys],
            requested=[
                scorers.attribute_classes(SUITE.prompts[key.prompt].attributes) for key in keys
            ],
            second_faces=references.second_faces
            and references.second_faces.select(torch.ones(len(keys), dtype=torch.long)),
            facial_values=references.facial_values,
        )
        for key, value in zip(keys, metric(inputs).tolist(), strict=True):
            expected = None if math.isnan(value) else round(value, 5)
            assert run.records[key].metrics[metric.name] == expected, metric.name


def test_undefined_fid_is_not_computed_again(finished: RunDir, tmp_path: Path) -> None:
    run_dir = copy_run(finished, tmp_path)
    run_dir.write_method_metrics({BASE: {}, "pulid": {"fid": None}})
    assert not needs_scoring(run_dir.load(), "pulid", MiniScorers.load())
    assert "fid" not in load_markdown(run_dir)


def test_failures_are_recorded_and_the_run_continues(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    subjects = [Subject("nobody", Image.new("RGB", (96, 96), "gray")), SUBJECTS[0]]
    executor = local_executor(build_worker(run_dir, subjects))
    generate_run(SUITE, PRESETS, subjects, run_dir, executor)
    score_run(run_dir, MiniScorers.load())
    failed = read_record(run_dir, SampleKey("pulid", "nobody", 0, SUITE.seeds[0]))
    assert failed.status == "failed" and "no face detected" in (failed.error or "")
    base, pulid = load_rows(run_dir)
    assert (pulid["images"], pulid["failed"], base["failed"]) == (4, 4, 0)
    assert "no face detected" in load_markdown(run_dir)


def test_rows_of_the_same_weights_share_adapter_and_extractor() -> None:
    presets = select_presets(SUITE, ["pulid", "faceid"], scales=[0.5])
    studios = load_studios(SUITE, presets, "cpu")
    pulid, faceid = studios["pulid"], studios["faceid"]
    for row in (studios["base"], studios["pulid@0.5"]):
        assert row.adapter is pulid.adapter and row.extractor is pulid.extractor
    assert studios["faceid@0.5"].adapter is faceid.adapter is not pulid.adapter
    assert studios["faceid@0.5"].preset.defaults.identity.scale == 0.5


def test_failed_preparation_is_not_tried_again(tmp_path: Path) -> None:
    """Neither for another prompt nor at another scale."""
    subjects = [Subject("nobody", Image.new("RGB", (96, 96), "gray")), SUBJECTS[0]]
    presets = {**PRESETS, "pulid@0.5": PRESETS["pulid"].with_defaults(scale=0.5)}
    run_dir = RunDir(tmp_path)
    studios = load_studios(SUITE, presets, "cpu")
    worker = Worker(SUITE, studios, subjects, run_dir)
    worker.generate(Job((SampleKey("pulid", "nobody", 0, SUITE.seeds[0]),)))
    # the photo is replaced by one with a face: another try would succeed
    worker.subjects["nobody"] = replace(SUBJECTS[0], name="nobody")
    for method, prompt in (("pulid", 1), ("pulid@0.5", 0)):
        key = SampleKey(method, "nobody", prompt, SUITE.seeds[0])
        worker.generate(Job((key,)))
        assert "no face detected" in (read_record(run_dir, key).error or "")
    other = SampleKey("pulid", SUBJECTS[0].name, 0, SUITE.seeds[0])
    worker.generate(Job((other,)))
    assert read_record(run_dir, other).is_done


def test_run_directory_accepts_only_its_own_suite(finished: RunDir) -> None:
    with pytest.raises(OptionError, match="another suite or other people"):
        finished.create(load_suite("miniature"), METHODS, SUBJECTS)
    # published values may change, and the same suite may be run again
    finished.create(replace(SUITE, published={"a paper": {}}), METHODS, SUBJECTS)
    finished.create(SUITE, [BASE, "pulid"], SUBJECTS)
    with pytest.raises(OptionError, match="contains no run"):
        RunDir(finished.path / "people").load()


def test_report_is_one_self_contained_page(finished: RunDir) -> None:
    pytest.importorskip("matplotlib")
    names = {path.name for path in report.write_report(finished.load())}
    assert names == {"report.md", "report.json", "report.html", "report.png", "faces.jpg"}
    # reference, base, pulid
    assert Image.open(finished.path / "faces.jpg").width == 2 * 24 + 3 * (176 + 16) - 16
    page = (finished.path / "report.html").read_text("utf-8")
    assert page.count("data:image/png") == 1 + 3 * (1 + 2 * 2) and 'src="http' not in page
    data = json.loads((finished.path / "report.json").read_text())
    assert data["suite"] == "quick"
    assert [row["scale"] for row in data["rows"]] == [None, 1.0]
    attributes = ResultTable(finished.load()).attributes()
    assert attributes is not None
    assert data["attributes"] == {"header": attributes.header, "rows": attributes.rows}
    text = load_markdown(finished)
    assert (
        "| pulid | 1 | 12 |" in text
        and "| base |  | 12 |" in text
        and "face_sim ↑" in text
        and "outside_face ↓" in text
    )
    assert "| seconds" not in text and "time to base" in text  # measured on a CPU
    assert "person_seconds ↓" in text and "person_kb ↓" in text
    assert "fid is the Frechet distance" in page and "CLIP features" in text


def test_report_of_one_person_has_no_intervals(finished: RunDir, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_dir = RunDir(tmp_path)
    run_dir.create(SUITE, METHODS, SUBJECTS[:1])
    for key in [key for method in METHODS for key in run_dir.load().keys(method)]:
        image = Image.open(finished.image_path(key))
        run_dir.write_record(read_record(finished, key), image)
    assert "report.png" in {path.name for path in report.write_report(run_dir.load())}

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not valid JSON")

    rows = json.loads((tmp_path / "report.json").read_text("utf-8"), parse_constant=refuse)["rows"]
    assert all(row["intervals"] == {} for row in rows) and rows[1]["clip_i"] < 1
    text = load_markdown(run_dir)
    assert "±" not in text and "nan" not in text


def test_large_images_are_shrunk_on_the_page(finished: RunDir, tmp_path: Path) -> None:
    run_dir, name = RunDir(tmp_path), SUBJECTS[0].name
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    noise = Image.fromarray(pixels)
    run_dir.create(SUITE, METHODS, [Subject(name, noise)])
    for method in METHODS:
        for prompt in range(2):
            key = SampleKey(method, name, prompt, SUITE.seeds[0])
            run_dir.write_record(read_record(finished, key), noise)
    page = report.format_page(ResultTable(run_dir.load()), None)
    assert page.count("data:image/jpeg") == 1 + 2 * 2
    assert "image/png" not in page and len(page) < 500_000


def test_page_has_four_people_and_no_extra_scales(finished: RunDir, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    people = synthetic_subjects(5, SUITE.first_person)
    methods = [*METHODS, "pulid@0.5"]
    run_dir.create(SUITE, methods, people)
    sample = finished.load().keys(BASE)[0]
    record, image = read_record(finished, sample), Image.open(finished.image_path(sample))
    for key in [key for method in methods for key in run_dir.load().keys(method)]:
        run_dir.write_record(replace(record, sample=key), image)
    page = report.format_page(ResultTable(run_dir.load()), None)
    prompts = len(SUITE.prompts)
    assert page.count("data:image/png") == 4 * (1 + 2 * prompts)
    assert 'alt="pulid"' in page and 'alt="pulid@0.5"' not in page


def test_report_works_without_metric_models(
    finished: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raise_missing(*_: object) -> MiniScorers:
        raise WeightsError("no detector.")

    run_dir = copy_run(finished, tmp_path)
    monkeypatch.setattr(commands, "_load_scorers", raise_missing)
    commands.report_run(run_dir.path, as_json=True)
    output = capsys.readouterr()
    assert json.loads(output.out) == ResultTable(finished.load()).to_json() and not output.err
    commands.report_run(run_dir.path)
    assert "no further metrics are computed: no detector." in capsys.readouterr().err


def test_attribute_table_has_a_row_per_requested_value(finished: RunDir) -> None:
    table = ResultTable(finished.load())
    attributes = table.attributes()
    assert attributes is not None
    assert f"<details><summary>{ATTRIBUTES_TITLE}" in report.format_page(table, None)
    assert attributes.header == ["attribute", "images", *METHODS]
    assert f"## {ATTRIBUTES_TITLE}" in table.to_markdown()
    requested = [prompt.attributes for prompt in SUITE.prompts]
    pairs = sorted({pair for attributes in requested for pair in attributes.items()})
    titles = [f"{name}: {value}".replace("_", " ") for name, value in pairs]
    assert [row[0] for row in attributes.rows] == titles
    photos = []
    for key in table.run.keys("pulid"):
        record = read_record(finished, key)
        assert record.attributes is not None and set(record.attributes) == set(
            requested[key.prompt]
        )
        share = sum(record.attributes.values()) / len(record.attributes)
        assert record.metrics["attributes"] == pytest.approx(share, abs=1e-5)
        if requested[key.prompt]["style"] == "photo":
            photos.append(record.attributes["style"])
    rows = {row[0]: dict(zip(attributes.header, row, strict=True)) for row in attributes.rows}
    assert rows["style: photo"]["pulid"] == f"{sum(photos) / len(photos):.3f}"
    assert rows["style: photo"]["images"] == str(len(photos))


def test_unchecked_attributes_need_scoring(finished: RunDir, tmp_path: Path) -> None:
    run_dir, scorers = copy_run(finished, tmp_path), MiniScorers.load()
    assert not needs_scoring(run_dir.load(), "pulid", scorers)
    record = read_record(run_dir, run_dir.load().keys("pulid")[0])
    run_dir.write_record(replace(record, attributes=None))
    assert needs_scoring(run_dir.load(), "pulid", scorers)


def test_costs_are_those_of_the_records(finished: RunDir, tmp_path: Path) -> None:
    run_dir = copy_run(finished, tmp_path)
    for key, record in finished.load().records.items():
        seconds, identify = (2.0, 0.0) if key.method == BASE else (3.0, 0.5)
        run_dir.write_record(
            replace(
                record,
                seconds=seconds,
                identify_seconds=identify,
                memory=1.5,
                hardware="an accelerator",
            )
        )
    _, pulid = load_rows(run_dir)
    assert [pulid[name] for name in COSTS] == [3.0, round(4 / 3, 5), 3.5, 1.5]
    assert pulid["ratio"] == 1.5
    assert all(f"{name} " in load_markdown(run_dir) for name in COSTS)


def test_times_of_other_starts_and_machines_are_not_compared(
    finished: RunDir, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create(SUITE, METHODS, SUBJECTS)
    base_keys, (first, *rest) = (run_dir.load().keys(method) for method in METHODS)

    def write(key: SampleKey, seconds: float, start: str, hardware: str = "cpu") -> None:
        record = read_record(finished, key)
        run_dir.write_record(replace(record, seconds=seconds, start=start, hardware=hardware))

    for key in base_keys:
        write(key, 2.0, "first")
    for key in (first, *rest):
        write(key, 3.0, "first")
    assert load_rows(run_dir)[1]["ratio"] == 1.5
    for key in rest:  # as of a run that was stopped, or of a method that was added later
        write(key, 9.0, "second")
    assert load_rows(run_dir)[1]["ratio"] == 1.5
    write(first, 3.0, "first", "another cpu")
    assert load_rows(run_dir)[1]["ratio"] is None
    overview = ResultTable(run_dir.load()).overview()
    assert [row[-1] for row in overview.rows] == ["1.00", ""]


def test_costs_of_other_starts_do_not_count(finished: RunDir, tmp_path: Path) -> None:
    """As of a run that was stopped: the machine may have been busy."""
    run_dir = copy_run(finished, tmp_path)
    records = finished.load().records
    slow = [key for key in records if key.method != BASE][1:]
    for key, record in records.items():
        start, seconds = ("second", 9.0) if key in slow else ("first", 2.0)
        run_dir.write_record(
            replace(record, seconds=seconds, start=start, hardware="a", memory=1.0)
        )
    base, pulid = load_rows(run_dir)
    assert base["seconds"] == pulid["seconds"] == 2.0 and pulid["memory"] == 1.0
    assert pulid["images"] == len(slow) + 1


def test_seconds_of_a_person_are_a_median_of_the_start_of_the_base(
    finished: RunDir, tmp_path: Path
) -> None:
    run_dir = copy_run(finished, tmp_path)
    seconds = dict(zip((subject.name for subject in SUBJECTS), (0.2, 0.3, 9.0), strict=True))
    last = finished.load().keys("pulid")[-1]
    for key, record in finished.load().records.items():
        identify = 0.0 if key.method == BASE else seconds[key.person]
        start = "first"
        if key == last:  # generated again in another start, while the machine was busy
            identify, start = 100.0, "second"
        run_dir.write_record(replace(record, identify_seconds=identify, start=start))
    base, pulid = load_rows(run_dir)
    assert pulid["person_seconds"] == 0.3 and "person_seconds" not in pulid["intervals"]
    assert "person_seconds" not in base
    for key in finished.load().keys(BASE):
        record = read_record(finished, key)
        run_dir.write_record(replace(record, start="third"))
    assert "person_seconds" not in load_rows(run_dir)[1]


def test_images_of_another_base_model_are_noted(finished: RunDir, tmp_path: Path) -> None:
    """The base was trained again, and only its own images and those of one method are new."""
    run_dir = copy_run(finished, tmp_path)
    assert ResultTable(run_dir.load()).notes() == ResultTable(finished.load()).notes()
    for key in finished.load().keys(BASE):
        record = read_record(finished, key)
        weights = {**record.configuration["weights"], "unet": ["new"]}
        configuration = {**record.configuration, "weights": weights}
        run_dir.write_record(replace(record, configuration=configuration))
    notes = [note for note in ResultTable(run_dir.load()).notes() if "other weights" in note]
    assert len(notes) == 1 and notes[0].startswith("pulid: some images are from other weights")
    assert "other weights" not in load_markdown(finished)


def test_method_specs_are_parsed_and_labeled() -> None:
    assert MethodSpec.parse("instantid:a/b.safetensors@0.5") == MethodSpec(
        "instantid", Path("a/b.safetensors"), 0.5
    )
    assert MethodSpec.parse("faceid:my@home.bin") == MethodSpec("faceid", Path("my@home.bin"))
    labels = [MethodSpec.parse(text).label for text in ("pulid", "pulid@0.50", "faceid:x/mine.bin")]
    assert labels == ["pulid", "pulid@0.5", "mine"]
    with pytest.raises(OptionError, match="METHOD@SCALE"):
        MethodSpec.parse("pulid@much")


def test_scales_of_a_method_form_one_curve() -> None:
    rows = [
        Row(name, {}, scale=scale)
        for name, scale in (("pulid", 0.7), ("other", math.nan), ("pulid@0.4", 0.4))
    ]
    curves = {name: [row.method for row in curve] for name, curve in group_curves(rows).items()}
    assert curves == {"pulid": ["pulid@0.4", "pulid"], "other": ["other"]}


def test_labels_are_unique() -> None:
    with pytest.raises(OptionError, match="both be called mine"):
        select_presets(SUITE, ["pulid:a/mine.safetensors", "faceid:b/mine.safetensors"])
    with pytest.raises(OptionError, match="both be called base"):
        select_presets(SUITE, ["pulid:base.safetensors"])


def test_missing_requirements_are_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchmetrics", None)
        for command in (
            partial(commands.run_suite, "quick", path),
            partial(commands.report_run, path),
        ):
            with pytest.raises(
                OptionError, match=r"needs torchmetrics: pip install 'openpulid\[bench\]'"
            ):
                command()
    with pytest.raises(OptionError, match=r"typo\.bin does not exist"):
        commands.run_suite("quick", path, methods="pulid,faceid:typo.bin")
    lost = {**PRESETS, "lost": PRESETS["pulid"].with_models(adapter=tmp_path / "none.safetensors")}
    with pytest.raises(
        WeightsError, match=r"none\.safetensors does not exist; .*`pulid mini build`"
    ):
        check_weights(lost)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(WeightsError, match=r"`pulid weights get sdxl-base .*instantid identitynet"):
        check_weights(select_presets(load_suite("pulid-paper"), ["instantid"]))
    with pytest.raises(OSError):
        generate_run(SUITE, lost, SUBJECTS, RunDir(path), lambda jobs: jobs)
    assert not path.exists()


def test_second_method_on_the_pipeline_does_not_change_the_first(
    finished: RunDir, tmp_path: Path
) -> None:
    """The report computes metrics that a stopped run lacks, also for a second method."""
    arguments = ["quick", "--methods", "pulid,faceid", "--count", "1", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "run", *arguments])
    assert result.exit_code == 0, result.output
    run_dir = RunDir(tmp_path)
    run = run_dir.load()
    for method in METHODS:
        for key in run.keys(method):
            assert run.images[key].read_bytes() == finished.image_path(key).read_bytes()
    rows = load_rows(run_dir)
    _, pulid, faceid = rows
    starts = {record.start for record in run.records.values()}
    assert len(starts) == 1 and None not in starts
    assert faceid["images"] == 4 and faceid["clip_i"] < 1
    assert faceid["face_sim"] != pulid["face_sim"]
    run_dir.write_record(replace(run.records[run.keys("faceid")[0]], metrics={}))
    (tmp_path / "method_metrics.json").unlink()
    assert CliRunner().invoke(app, ["bench", "report", str(tmp_path)]).exit_code == 0
    assert load_rows(run_dir) == rows


def test_two_workers_give_the_same_table(finished: RunDir, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from openpulid.bench.ray_backend import ray_executor

    run_dir = RunDir(tmp_path)
    executor = ray_executor(lambda: build_worker(run_dir), "2")
    generate_run(SUITE, PRESETS, SUBJECTS, run_dir, executor)
    score_run(run_dir, MiniScorers.load())
    assert load_rows_without_times(run_dir) == load_rows_without_times(finished)
