"""The ablation of the paper (PuLID, arXiv 2404.16022, section 4.4): a sweep over recipe options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpulid.bench.metrics import Interval
from openpulid.io.checkpoints import sha256
from openpulid.io.files import replace_file
from openpulid.mini.evaluation.evaluate import Table, run
from openpulid.mini.evaluation.variants import shorten, variant_folder
from openpulid.mini.train import pulid as adapter
from openpulid.pipelines.presets import MINIATURE
from openpulid.training.pulid import ADAPTER_FILE, Recipe, find_recipe

PRESET = "mini-lightning"
"""The later stages are trained through the four steps of the student; the paper evaluates on
SDXL-Lightning."""
GRAD_STEPS = (1, 2, 3, 4)
"""Numbers of last steps of the lightning branch that carry gradient."""
TRAINED_ON = (
    "pipeline/**/*",
    "lightning/*",
    "detector",
    "recognition-encoder",
    "recognition-loss",
    "vision-encoder",
)
"""Weights that an adapter trains on; with others it is trained again."""
PRESERVATION = {
    "clip_i": "CLIP-I between images with and without identity",
    "outside_face": "change outside the face",
}
ALIGNMENT = ((0.0, 0.0), (0.6, 0.1), (3.0, 0.0), (0.0, 0.5), (3.0, 0.5))
"""Weights of L_sem and L_layout. The second pair is the paper's."""


def sweep_recipes() -> dict[str, Recipe]:
    """Return the recipes of the sweep by name.

    Stage 2 with gradients through 1 to 4 steps, and stage 3 with the weights of `ALIGNMENT` and the
    paper's losses alone.
    """
    stage2 = find_recipe("mini_stage2")
    stage3 = replace(find_recipe("mini_stage3"), outside_weight=0.0, base_guidance_scale=1.0)
    recipes = {f"k={steps}": replace(stage2, grad_steps=steps) for steps in GRAD_STEPS}
    for semantic, layout in ALIGNMENT:
        name = f"sem {semantic:g}, layout {layout:g}"
        recipes[name] = replace(stage3, semantic_weight=semantic, layout_weight=layout)
    return recipes


def sweep(
    steps: int,
    people: int,
    *,
    runs: Path = Path("runs/mini"),
    device: str | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Table:
    """Train every recipe of `sweep_recipes` from the adapter that it begins with, and evaluate all.

    Args:
        steps: training steps of each; the learning rate follows the schedule of a complete
            training.
        people: number of held-out people, with one prompt each.
        runs: the adapters are stored below this folder. An adapter that exists with the same recipe
            is not trained again, unless it began with other weights.
        device: where to compute; the best device by default.
        log: receives a line per training.
    """
    files = [file for name in TRAINED_ON for file in MINIATURE.glob(f"{name}.safetensors")]
    weights = "".join(map(sha256, sorted(files)))
    adapters: dict[str, Path] = {}
    for name, recipe in sweep_recipes().items():
        short = shorten(recipe, steps)
        begin = adapter.find_init_adapter(recipe.init_from or "", runs / "any")
        folder = variant_folder(runs / "sweep", name, short, sha256(begin) + weights)
        file = folder / ADAPTER_FILE
        if not file.exists():
            log(f"{name}: {steps} steps")
            adapter.train(
                short,
                folder,
                init_adapter=begin,
                runs=runs,
                device=device,
            )
        adapters[name] = file
    return run(people, prompts=1, preset=PRESET, adapters=adapters, device=device)


def plot(table: Table, path: Path) -> None:
    """Plot identity over preservation with 95% intervals; up and to the right is better.

    The first row shows the numbers of steps with gradient, the second the alignment weights.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    titles = {
        "k": "stage 2, gradients through the last k of 4 steps",
        "sem": "stage 3, alignment weights",
    }
    for row, (prefix, title) in zip(figure.subplots(2, 2), titles.items(), strict=True):
        names = [name for name in sweep_recipes() if name.startswith(prefix) and name in table.rows]
        for axes, (column, label) in zip(row, PRESERVATION.items(), strict=True):
            _plot_points(axes, table.rows, names, column)
            axes.set(title=title, xlabel=label, ylabel="face similarity")
            axes.grid(alpha=0.3)
        row[1].invert_xaxis()
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _plot_points(
    axes: Any,
    rows: Mapping[str, Mapping[str, Interval]],
    names: Sequence[str],
    column: str,
) -> None:
    for name in names:
        x, y = rows[name][column], rows[name]["face_sim"]
        errors = {
            "xerr": [[x.mean - x.low], [x.high - x.mean]],
            "yerr": [[y.mean - y.low], [y.high - y.mean]],
        }
        axes.errorbar(
            x.mean, y.mean, **errors, marker="o", markersize=7, elinewidth=0.6, label=name
        )
    axes.legend(fontsize=8)
