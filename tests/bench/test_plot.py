"""Tests of the plot of a report."""

from __future__ import annotations

import pytest

from openpulid.bench.metrics import Interval
from openpulid.bench.plot import assign_styles, build_figure, draw_plot
from openpulid.bench.run_dir import BASE
from openpulid.bench.table import Row

METHODS = [f"method-{index}" for index in range(14)]


def build_row(
    method: str,
    scale: float = float("nan"),
    metric: str = "outside_face",
    face_sim: float = 0.3,
    change: float = 0.05,
) -> Row:
    columns = {
        "face_sim": Interval(face_sim, face_sim - 0.1, face_sim + 0.1),
        metric: Interval(change, change - 0.01, change + 0.01),
    }
    return Row(method, columns, scale=scale)


def test_fourteen_methods_and_the_base_differ_in_color_and_marker() -> None:
    styles = assign_styles([BASE, *METHODS, "method-3@0.5"])
    assert list(styles) == [BASE, *METHODS]
    assert len({color for color, _ in styles.values()}) == 15
    many = assign_styles([f"method-{index}" for index in range(100)])
    assert len(set(many.values())) == 101


def test_legend_names_the_methods_and_points_have_their_scales() -> None:
    pytest.importorskip("matplotlib")
    rows = [build_row(BASE)]
    for index, method in enumerate(METHODS):
        rows += [
            build_row(f"{method}@0.5", 0.5, face_sim=index / 14, change=0.02),
            build_row(method, 1.0, face_sim=index / 14),
        ]
    rows.append(build_row("textual-inversion"))
    figure = build_figure(rows)
    assert figure is not None
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.5", "1"] * 14
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [BASE, *METHODS, "textual-inversion"]


def test_clip_i_replaces_a_change_that_was_not_measured() -> None:
    pytest.importorskip("matplotlib")
    figure = build_figure([build_row("pulid", metric="clip_i")])
    assert figure is not None and "CLIP-I" in figure.axes[0].get_xlabel()
    assert draw_plot([Row("pulid", {"face_sim": Interval(0.3)})]) is None


def test_labels_are_left_out_where_points_are_close() -> None:
    pytest.importorskip("matplotlib")
    rows = [build_row(f"pulid@{scale}", scale) for scale in (0.3, 0.6)]
    figure = build_figure([*rows, build_row("pulid@1", 1.0, face_sim=0.6)])
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.3", "1"]


def test_a_single_person_has_no_intervals() -> None:
    pytest.importorskip("matplotlib")
    columns = {"face_sim": Interval(0.3), "outside_face": Interval(0.04)}
    figure = build_figure([Row("pulid", columns, scale=1.0)])
    assert figure is not None and figure.axes[0].get_xlim()[0] == pytest.approx(0.044)


def test_large_changes_are_logarithmic() -> None:
    pytest.importorskip("matplotlib")
    small = build_figure([build_row(BASE, change=0.01), build_row("pulid", change=0.03)])
    large = build_figure([build_row(BASE, change=0.01), build_row("lora", change=0.2)])
    assert small is not None and large is not None
    assert small.axes[0].get_xlabel() == "change outside the face"
    axes = large.axes[0]
    assert axes.get_xlabel() == "change outside the face (logarithmic above 0.05)"
    assert [tick.get_text() for tick in axes.get_xticklabels()][-3:] == ["0.05", "0.1", "0.2"]
    left, right = axes.get_xlim()
    assert left > right  # a small change is on the right
    positions = axes.transData.transform([(0.05, 0), (0.2, 0), (0, 0)])[:, 0]
    assert positions[0] - positions[1] < positions[2] - positions[0]
