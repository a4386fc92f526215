"""Tests of the plot of a report."""

from __future__ import annotations

import pytest

from openpulid.bench.metrics import Interval
from openpulid.bench.plot import assign_styles, build_figure, draw_plot
from openpulid.bench.run_dir import BASE
from openpulid.bench.table import Row

METHODS = [f"method-{index}" for index in range(14)]


def build_row(method: str, scale: float = float("nan"), metric: str = "outside_face") -> Row:
    columns = {"face_sim": Interval(0.3, 0.2, 0.4), metric: Interval(0.05, 0.04, 0.06)}
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
    for method in METHODS:
        rows += [build_row(f"{method}@0.5", 0.5), build_row(method, 1.0)]
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
