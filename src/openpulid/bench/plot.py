"""The plot of a report: identity against preservation."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from openpulid.bench.equal_similarity import group_curves
from openpulid.bench.run_dir import BASE
from openpulid.bench.table import HIGHER_IS_BETTER, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESERVATION_LABELS: Mapping[str, str] = {
    "outside_face": "change outside the face",
    "clip_i": "CLIP-I, with and without identity",
}
"""Metrics of the plot's horizontal axis; the first one that was measured is used."""

COLORS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
    "#7f7f7f", "#bcbd22", "#08306b", "#67000d", "#00441b", "#c2007b", "#b8860b",
)  # fmt: skip
"""Matplotlib's ten colors, and five darker ones."""

LINEAR_CHANGE = 0.05
"""Changes outside the face up to this one are plotted linearly, larger ones logarithmically."""

CHANGE_TICKS = (0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1)

LABEL_SIZE = (22, 11)
"""Width and height in pixels that the label of a point needs."""

MARKERS = "os^DvP<X>phd8"
"""Fewer than `COLORS`, so that pairs repeat only after all combinations."""


def draw_plot(rows: Sequence[Row]) -> Image.Image | None:
    """Draw the plot of `build_figure`; None if one of its two metrics was not measured."""
    figure = build_figure(rows)
    if figure is None:
        return None
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


def build_figure(rows: Sequence[Row]) -> Figure | None:
    """Plot identity against preservation, one curve per method with intervals of its points.

    The legend names the methods. A point has the scale of its row, if the method has several and
    there is room for it.

    Returns:
        The figure; None if one of the two was not measured.
    """
    from matplotlib.figure import Figure

    metric = next((name for name in PRESERVATION_LABELS if _is_measured(rows, name)), "")
    points = [row for row in rows if metric in row.columns and "face_sim" in row.columns]
    if not points:
        return None
    figure = Figure(figsize=(9.2, 6.8), layout="constrained", dpi=140, facecolor="#faf9f6")
    axes = figure.subplots()
    styles = assign_styles([row.method for row in points])
    curves = group_curves(points)
    for method, curve in curves.items():
        _draw_curve(axes, method, curve, metric, styles[method])
    label = PRESERVATION_LABELS[metric]
    if not HIGHER_IS_BETTER[metric]:
        # a method that changes everything would leave no room for the others
        axes.set_xscale("symlog", linthresh=LINEAR_CHANGE, linscale=2)
        changes = [row.columns[metric] for row in points]
        # a single person has no interval
        limit = 1.1 * max(x.mean if math.isnan(x.high) else x.high for x in changes)
        axes.set_xlim(limit, -0.05 * LINEAR_CHANGE)
        ticks = [x for x in CHANGE_TICKS if x <= limit]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        if limit > LINEAR_CHANGE:
            label += f" (logarithmic above {LINEAR_CHANGE:g})"
    axes.set_xlabel(label)
    axes.set_ylabel("face similarity")
    axes.set_title("up and right is better; numbers are scales", fontsize=9, color="gray")
    axes.margins(0.06)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    figure.draw_without_rendering()  # places the axes
    _label_scales(axes, curves, metric, styles)
    return figure


def assign_styles(rows: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Assign a color and a marker to each method.

    Args:
        rows: METHOD or METHOD@SCALE.

    Returns:
        Method -> color and marker; no two methods have both in common.
    """
    styles = {BASE: ("black", "*")}
    for row in rows:
        method = row.partition("@")[0]
        index = len(styles) - 1
        styles.setdefault(method, (COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]))
    return styles


def _draw_curve(
    axes: Any, method: str, curve: Sequence[Row], metric: str, style: tuple[str, str]
) -> None:
    color, marker = style
    x = [row.columns[metric] for row in curve]
    y = [row.columns["face_sim"] for row in curve]
    axes.errorbar(
        [i.mean for i in x],
        [i.mean for i in y],
        xerr=[[i.mean - i.low for i in x], [i.high - i.mean for i in x]],
        yerr=[[i.mean - i.low for i in y], [i.high - i.mean for i in y]],
        color=color,
        linestyle="none",
        elinewidth=0.8,
        alpha=0.35,
    )
    axes.plot(
        [i.mean for i in x],
        [i.mean for i in y],
        color=color,
        marker=marker,
        markersize=7,
        linewidth=1.4,
        label=method,
    )


def _label_scales(
    axes: Any,
    curves: Mapping[str, Sequence[Row]],
    metric: str,
    styles: Mapping[str, tuple[str, str]],
) -> None:
    """Write the scale next to each point of a curve, unless another label is there."""
    from matplotlib.patheffects import withStroke

    width, height = LABEL_SIZE
    places: list[tuple[float, float]] = []
    for method, curve in curves.items():
        for row in curve:
            if len(curve) == 1 or math.isnan(row.scale):
                continue
            point = (row.columns[metric].mean, row.columns["face_sim"].mean)
            x, y = axes.transData.transform(point)
            if any(abs(x - i) < width and abs(y - j) < height for i, j in places):
                continue
            places.append((x, y))
            axes.annotate(
                f"{row.scale:g}",
                point,
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=7,
                color=styles[method][0],
                path_effects=[withStroke(linewidth=1.2, foreground="white")],
            )


def _is_measured(rows: Sequence[Row], name: str) -> bool:
    return any(name in row.columns for row in rows)
