"""The ablation: the image of all stages, and the recipes and plot of the sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from openpulid.bench.metrics import Interval
from openpulid.mini.evaluation import ablation, evaluate
from openpulid.mini.evaluation.adapters import find_adapters
from openpulid.mini.evaluation.evaluate import Table
from openpulid.mini.evaluation.stage_sheet import draw_stages


def test_sweep_varies_one_option_at_a_time() -> None:
    recipes = ablation.sweep_recipes()
    steps = [recipe for name, recipe in recipes.items() if name.startswith("k=")]
    assert [recipe.grad_steps for recipe in steps] == [1, 2, 3, 4]
    assert all(
        (recipe.semantic_weight, recipe.layout_weight, recipe.init_from) == (0, 0, "mini_stage1")
        for recipe in steps
    )
    weights = [recipe for name, recipe in recipes.items() if name.startswith("sem")]
    assert (0.6, 0.1) in [
        (recipe.semantic_weight, recipe.layout_weight) for recipe in weights
    ]  # the paper's
    assert {(recipe.grad_steps, recipe.init_from) for recipe in weights} == {
        (weights[0].grad_steps, "mini_stage2")
    }


def test_plot_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {name: Interval(0.5, 0.4, 0.6) for name in evaluate.COLUMNS}
    table = Table(
        {"base": row, **dict.fromkeys(ablation.sweep_recipes(), row)},
        64,
        1,
        0,
        "mini-lightning",
        1.0,
    )
    ablation.plot(table, tmp_path / "sweep.png")
    assert Image.open(tmp_path / "sweep.png").size[0] > 1000


def test_stages_image_has_column_per_stage(tmp_path: Path) -> None:
    stages = find_adapters()
    assert stages, "no adapter is installed"
    pages = [draw_stages(people=1, side=96, preset=name) for name in ("mini-lightning", "mini")]
    width = 2 * 24 + (2 + len(stages)) * (96 + 16) - 16
    for page in pages:
        assert page.size[0] == width and len(page.getcolors(1 << 24) or []) > 1000
    assert pages[0].tobytes() != pages[1].tobytes()
