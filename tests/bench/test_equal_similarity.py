"""Tests of the comparison at equal similarity, on runs whose numbers are checked by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from openpulid.bench.equal_similarity import (
    PRESERVATION,
    EqualSimilarity,
    Match,
    Point,
    compare_at_equal_similarity,
    find_segment,
    match_point,
)
from openpulid.bench.report import write_report
from openpulid.bench.run_dir import BASE, Record, Run, RunDir, SampleKey, Subject
from openpulid.bench.suite import Prompt, Suite
from openpulid.bench.table import EQUAL_SIMILARITY_TITLE, ResultTable

PEOPLE = ("anna", "ben")
SUITE = Suite("Two people.", "mini", seeds=[1], prompts=[Prompt("portrait")], name="hand")

Metrics = Mapping[str, Sequence["float | None"]]
"""Metric -> value for each person."""

LOW: Metrics = {"face_sim": (0.1, 0.3), "clip_i": (0.96, 0.98), "outside_face": (0.02, 0.03)}
HIGH: Metrics = {"face_sim": (0.5, 0.7), "clip_i": (0.80, 0.90), "outside_face": (0.06, 0.05)}
OTHER: Metrics = {"face_sim": (0.2, 0.6), "clip_i": (0.83, 0.95), "outside_face": (0.05, 0.06)}
"""Halfway between LOW and HIGH in the mean of face_sim: .2, .4, .6."""

UNMEASURED = {name: torch.full((32,), torch.nan, dtype=torch.float64) for name in PRESERVATION}


def build_record(key: SampleKey, scale: float, metrics: Mapping[str, float | None]) -> Record:
    return Record(
        key,
        "done",
        {"scale": scale, "num_inference_steps": 4},
        "cpu",
        {"torch": "2"},
        seconds=1.0,
        metrics=metrics,
    )


def build_run(rows: Mapping[tuple[str, float], Metrics], suite: Suite = SUITE) -> Run:
    """Return a run with these metrics of METHOD and scale, the same for every prompt and seed."""
    methods = [BASE, *(method for method, _ in rows if method != BASE)]
    run = Run(Path("unused"), suite, PEOPLE, methods, {}, {}, {})
    records = {}
    for (method, scale), metrics in rows.items():
        for key in run.keys(method):
            person = PEOPLE.index(key.person)
            values = {name: column[person] for name, column in metrics.items()}
            records[key] = build_record(key, scale, values)
    return Run(run.path, suite, PEOPLE, methods, records, {}, {})


def compare(rows: Mapping[tuple[str, float], Metrics]) -> EqualSimilarity:
    comparison = compare_at_equal_similarity(build_run(rows))
    assert comparison is not None
    return comparison


def compare_one(other: Metrics, name: str = "faceid") -> Match:
    curve = {("pulid", 0.8): HIGH, ("pulid@0.4", 0.4): LOW}
    (match,) = compare({**curve, (name, 1.0): other}).matches
    return match


def test_reference_is_interpolated_per_person() -> None:
    match = compare_one(OTHER)
    assert (match.method, match.face_sim) == ("faceid", pytest.approx(0.4))
    assert match.scale == pytest.approx(0.6)
    assert list(match.differences) == ["clip_i", "outside_face"]
    # anna: (.96 + .80) / 2 - .83 = +.05, ben: (.98 + .90) / 2 - .95 = -.01
    clip_i = match.differences["clip_i"]
    assert clip_i.interval.mean == pytest.approx(0.02)
    assert (clip_i.num_better, clip_i.num_people) == (1, 2)
    # anna: .04 - .05, ben: .04 - .06; less change is better
    outside = match.differences["outside_face"]
    assert outside.interval.mean == pytest.approx(-0.015)
    assert (outside.num_better, outside.num_people) == (2, 2)


def test_fraction_is_found_again_in_each_bootstrap_sample() -> None:
    """A quarter of the samples is anna alone, another one ben alone."""
    match = compare_one(OTHER)
    # anna alone: .2 is a quarter of the way from .1 to .5, and .92 - .83 = +.09
    # ben alone: .6 is three quarters of the way from .3 to .7, and .92 - .95 = -.03
    clip_i = match.differences["clip_i"].interval
    assert (clip_i.low, clip_i.high) == pytest.approx((-0.03, 0.09))
    # .03 - .05 and .045 - .06; both: -.015
    outside = match.differences["outside_face"].interval
    assert (outside.low, outside.high) == pytest.approx((-0.02, -0.015))
    assert match.share == 1


def test_bootstrap_samples_off_the_curve_are_skipped_and_reported() -> None:
    other: Metrics = {"face_sim": (0.0, 0.6), "clip_i": (0.83, 0.95)}
    curve = {("pulid", 0.8): HIGH, ("pulid@0.4", 0.4): LOW}
    comparison = compare({**curve, ("faceid", 1.0): other})
    (match,) = comparison.matches
    # anna alone is below the curve, a quarter of the samples; both: .3, a quarter of the way
    assert match.share == pytest.approx(0.75, abs=0.02)
    assert comparison.notes == [
        f"faceid is near an end of the curve of pulid: its face_sim is on the curve in "
        f"{match.share:.0%} of the bootstrap samples, and its intervals are from these alone."
    ]
    # both: (.92 - .83 + .96 - .95) / 2, ben alone: .92 - .95
    clip_i = match.differences["clip_i"].interval
    assert (clip_i.low, clip_i.high) == pytest.approx((-0.03, 0.05))


def test_intervals_cover_the_true_difference() -> None:
    """32 people, numbers like those of the miniature, and a curve that is flat at its end.

    The similarity of the method is .385, where the curve gains .033 for a clip_i of .042.
    """
    curve_sim = torch.tensor([0.184, 0.306, 0.366, 0.399], dtype=torch.float64)
    curve_clip = torch.tensor([0.977, 0.954, 0.930, 0.888], dtype=torch.float64)
    fraction = (0.385 - 0.366) / 0.033
    truth = 0.930 - fraction * 0.042 - 0.90
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    num_covered = 0
    for _ in range(40):
        person = draw(32)
        curve = []
        clip_noise = 0.012 * draw(32)
        for row in range(4):
            face_sim = curve_sim[row] + 0.058 * person + 0.02 * draw(32)
            means = {"face_sim": face_sim, "clip_i": curve_clip[row] + clip_noise}
            curve.append(Point(f"pulid@{row}", row, {**UNMEASURED, **means}))
        face_sim = 0.385 + 0.06 * (0.5 * person + 0.75**0.5 * draw(32))
        means = {"face_sim": face_sim, "clip_i": 0.90 + 0.0087 * draw(32)}
        match = match_point(curve, Point("lora", 1.0, {**UNMEASURED, **means}), face_sim > -1)
        if match is None:  # above the curve
            continue
        interval = match.differences["clip_i"].interval
        num_covered += interval.low <= truth <= interval.high
    # of 37; with a fixed fraction 9
    assert num_covered >= 33


def test_fraction_follows_the_similarity() -> None:
    match = compare_one({"face_sim": (0.2, 0.4), "clip_i": (0.9, 0.9)})  # a quarter of the way
    assert match.scale == pytest.approx(0.5)
    # anna: .92 - .9, ben: .96 - .9
    assert match.differences["clip_i"].interval.mean == pytest.approx(0.04)


def test_method_equal_to_a_row_of_the_reference_differs_by_zero() -> None:
    for row, scale in ((LOW, 0.4), (HIGH, 0.8)):
        match = compare_one(row)
        assert match.scale == pytest.approx(scale)
        for difference in match.differences.values():
            assert difference.interval.mean == pytest.approx(0)
            assert difference.num_better == 0


def test_every_row_of_a_method_is_compared_or_left_out_with_a_reason() -> None:
    stronger = {**OTHER, "face_sim": (0.7, 0.9)}
    comparison = compare(
        {
            ("pulid@0.4", 0.4): LOW,
            ("pulid", 0.8): HIGH,
            ("faceid@0.5", 0.5): OTHER,
            ("faceid", 1.0): stronger,
        }
    )
    assert [match.method for match in comparison.matches] == ["faceid@0.5"]
    assert comparison.notes == [
        "faceid is left out: its face_sim of 0.800 is outside the curve of pulid, 0.200 to 0.600."
    ]


def test_curve_begins_with_the_base() -> None:
    base: Metrics = {"face_sim": (0.0, 0.1), "clip_i": (1.0, 1.0), "outside_face": (0.0, 0.0)}
    weak: Metrics = {"face_sim": (0.1, 0.15), "clip_i": (0.9, 0.9), "outside_face": (0.1, 0.1)}
    rows = {("base", 0.0): base, ("pulid@0.4", 0.4): LOW, ("pulid", 0.8): HIGH}
    comparison = compare({**rows, ("face0", 1.0): weak})
    (match,) = comparison.matches
    # .125 is half of the way from the base's .05 to .2
    assert match.scale == pytest.approx(0.2)
    assert match.differences["clip_i"].interval.mean == pytest.approx((0.98 + 0.99) / 2 - 0.9)
    # a tuned method has another prompt than the base, which is not the method at scale 0
    rows = {("base", 0.0): base, ("lora@0.4", 0.4): LOW, ("lora", 0.8): HIGH}
    run = build_run({**rows, ("face0", 1.0): weak})
    tuned = {
        key: replace(record, configuration={**record.configuration, "recipe": {}})
        if key.method.startswith("lora")
        else record
        for key, record in run.records.items()
    }
    comparison = compare_at_equal_similarity(replace(run, records=tuned))
    assert comparison is not None and comparison.matches == []
    assert "face0 is left out" in comparison.notes[0]


def test_lower_scale_is_used_where_a_curve_turns_back() -> None:
    assert find_segment([0.2, 0.6, 0.3], 0.4) == (0, pytest.approx(0.5))
    assert find_segment([0.2, 0.6, 0.1], 0.15) == (1, pytest.approx(0.9))
    assert find_segment([0.2, 0.2], 0.2) == (0, 0.0)
    assert find_segment([0.2, 0.6], 0.7) is None


def test_person_without_all_rows_is_left_out() -> None:
    other: Metrics = {"face_sim": (0.3, None), "clip_i": (0.8, 0.5)}
    match = compare_one(other)
    # anna alone: .1 to .5 at .3
    assert (match.face_sim, match.scale) == (pytest.approx(0.3), pytest.approx(0.6))
    clip_i = match.differences["clip_i"]
    assert clip_i.interval.mean == pytest.approx(0.08) and clip_i.num_people == 1
    comparison = compare(
        {
            ("pulid", 0.8): {**HIGH, "face_sim": (0.5, None)},
            ("pulid@0.4", 0.4): LOW,
            ("faceid", 1.0): {**OTHER, "face_sim": (None, 0.6)},
        }
    )
    assert comparison.matches == []
    assert comparison.notes == [
        "faceid is left out: no prompt and seed has an image of it and of all rows of pulid."
    ]


def test_single_scale_names_the_command() -> None:
    comparison = compare({("pulid", 0.8): HIGH, ("faceid", 1.0): OTHER, ("faceid@2", 2.0): HIGH})
    assert comparison.matches == []
    (note,) = comparison.notes
    assert "needs pulid at several scales" in note and "`--scales 0.3,0.5,1`" in note
    assert "`--methods pulid@0.3,pulid@0.5,pulid`" in note


def test_reference_is_the_first_method_with_a_scale() -> None:
    comparison = compare(
        {
            ("textual-inversion", 1.0): OTHER,
            ("pulid@0.4", 0.4): LOW,
            ("pulid", 0.8): HIGH,
        }
    )
    assert comparison.reference == "pulid"
    assert [match.method for match in comparison.matches] == ["textual-inversion"]


def test_pulid_is_the_reference_wherever_it_is_in_the_run() -> None:
    rows = {("faceid@0.5", 0.5): LOW, ("faceid", 1.0): OTHER}
    comparison = compare({**rows, ("pulid@0.4", 0.4): LOW, ("pulid", 0.8): HIGH})
    assert comparison.reference == "pulid"
    comparison = compare({**rows, ("instantid", 0.8): LOW})
    assert comparison.reference == "faceid"


def test_single_method_is_not_compared() -> None:
    assert compare_at_equal_similarity(build_run({("pulid", 0.8): HIGH})) is None
    unscored: Metrics = {"clip_i": (0.9, 0.9)}
    rows = {("pulid", 0.8): unscored, ("faceid", 1.0): unscored}
    assert compare_at_equal_similarity(build_run(rows)) is None


def test_images_of_a_person_are_averaged_over_the_scored_prompts() -> None:
    suite = Suite(
        "Two prompts.",
        "mini",
        seeds=[1, 2],
        prompts=[Prompt("portrait"), Prompt("photo")],
        identity_prompts=[1],
    )
    rows = {("pulid@0.4", 0.4): LOW, ("pulid", 0.8): HIGH, ("faceid", 1.0): OTHER}
    run = build_run(rows, suite)
    records = dict(run.records)
    for key, record in run.records.items():
        if key.method != "faceid":
            continue
        sign = 1 if key.seed == 1 else -1
        metrics = {name: (value or 0) + sign * 0.1 for name, value in record.metrics.items()}
        # identity counts on prompt 1 alone, and the rest on prompt 0 alone
        ignored = {"face_sim": 0.9} if key.prompt == 0 else {"clip_i": 0.1}
        records[key] = build_record(key, 1.0, {**metrics, **ignored})
    comparison = compare_at_equal_similarity(
        Run(run.path, suite, PEOPLE, run.methods, records, {}, {})
    )
    assert comparison is not None
    (match,) = comparison.matches
    assert match.face_sim == pytest.approx(0.4)
    assert match.differences["clip_i"].interval.mean == pytest.approx(0.02)


def test_only_prompts_and_seeds_of_all_rows_are_compared() -> None:
    """In an unfinished run, the hard prompt of ben is missing for one method."""
    suite = replace(SUITE, prompts=[Prompt("easy"), Prompt("hard")])
    rows = {("pulid@0.4", 0.4): LOW, ("pulid", 0.8): HIGH, ("faceid", 1.0): OTHER}
    run = build_run(rows, suite)
    records = {}
    for key, record in run.records.items():
        if key == SampleKey("faceid", "ben", 1, 1):
            continue
        clip_t = 60.0 if key.prompt == 0 else 50.0  # the same for all methods
        records[key] = replace(record, metrics={**record.metrics, "clip_t": clip_t})
    comparison = compare_at_equal_similarity(replace(run, records=records))
    assert comparison is not None
    clip_t = comparison.matches[0].differences["clip_t"]
    assert clip_t.num_people == 2
    assert (clip_t.interval.low, clip_t.interval.mean, clip_t.interval.high) == pytest.approx(
        (0, 0, 0), abs=1e-9
    )


def test_comparison_is_in_all_reports(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = {("pulid", 0.8): HIGH, ("pulid@0.4", 0.4): LOW, ("faceid", 1.0): OTHER}
    run_dir = RunDir(tmp_path)
    image = Image.new("RGB", (16, 16))
    run = build_run({**rows, ("faceid@0.1", 0.1): {**OTHER, "face_sim": (0.0, 0.1)}})
    run_dir.create(SUITE, run.methods, [Subject(person, image) for person in PEOPLE])
    for record in run.records.values():
        run_dir.write_record(record, image)
    write_report(run_dir.load())

    text = (tmp_path / "report.md").read_text("utf-8")
    assert f"## {EQUAL_SIMILARITY_TITLE}" in text
    assert "| method | face_sim | scale of pulid | clip_i ↑ | outside_face ↓ |" in text
    assert "| faceid | 0.400 | 0.60 | +0.020 ± 0.060 (1 of 2) | -0.015 ± 0.003 (2 of 2) |" in text
    assert "faceid@0.1 is left out" in text
    data = json.loads((tmp_path / "report.json").read_text("utf-8"))["equal_similarity"]
    assert data["reference"] == "pulid" and len(data["notes"]) == 1
    assert data["rows"] == [
        {
            "method": "faceid",
            "face_sim": 0.4,
            "scale": 0.6,
            "differences": {
                "clip_i": {"mean": 0.02, "interval": [-0.03, 0.09], "better": 1, "people": 2},
                "outside_face": {
                    "mean": -0.015,
                    "interval": [-0.02, -0.015],
                    "better": 2,
                    "people": 2,
                },
            },
        }
    ]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert f"<h2>{EQUAL_SIMILARITY_TITLE}</h2>" in page
    assert "+0.020 ± 0.060 (1 of 2)" in page and "faceid@0.1 is left out" in page


def test_rows_without_a_scale_have_none() -> None:
    rows = {("pulid@0.4", 0.4): LOW, ("pulid", 0.8): HIGH, ("textual-inversion", 1.0): OTHER}
    data = ResultTable(build_run({("base", 0.0): LOW, **rows})).to_json()
    assert [row["scale"] for row in data["rows"]] == [None, 0.4, 0.8, None]
    assert data["attributes"] is None  # none were checked


def test_report_of_one_method_has_no_comparison() -> None:
    table = ResultTable(build_run({("pulid", 0.8): HIGH}))
    assert EQUAL_SIMILARITY_TITLE not in table.to_markdown()
    assert table.to_json()["equal_similarity"] is None
