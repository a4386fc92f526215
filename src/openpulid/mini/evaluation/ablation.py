"""The paper's ablation (PuLID, arXiv 2404.16022, section 4.4) on the miniature: a picture of every stage, and a sweep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from openpulid.io.checkpoints import read_metadata
from openpulid.io.image_grid import labeled_grid, to_pil
from openpulid.mini.evaluation import evaluate
from openpulid.mini.evaluation.evaluate import Table
from openpulid.mini.train import pulid as adapter
from openpulid.pipelines.presets import MINIATURE
from openpulid.pipelines.studio import load
from openpulid.training.pulid.recipes import Recipe, find_recipe

COLUMNS = {
    "base": "without",
    "stage1": "stage 1",
    "naive": "naive ID loss",
    "stage2": "stage 2",
    "stage3": "stage 3",
}
PRESET = "mini-lightning"
"""The later stages are trained through the student's four steps, and the paper measures on SDXL-Lightning."""
LAST = (1, 2, 3, 4)
"""Steps of the lightning branch that carry gradient."""
PURITY = {
    "clip_i": "CLIP-I with against without the identity",
    "outside_face": "changed outside the face",
}
ALIGNMENT = ((0.0, 0.0), (0.6, 0.1), (3.0, 0.0), (0.0, 0.5), (3.0, 0.5))
"""Weights of L_sem and L_layout; the second are the paper's; the recipe has three times as much."""


def draw_stages(people: int = 6, people_seed: int = 0, side: int = 176) -> Image.Image:
    """Held-out people, a row each: the only picture given, then the same prompt and seed through every stage."""
    asked, portraits = (
        evaluate.sample_prompts(people, 1, people_seed),
        evaluate.render_portraits(people, people_seed),
    )
    studio = load(PRESET)
    identities = [studio.identify([portrait]) for portrait in to_pil(portraits)]
    columns = {"given": portraits, COLUMNS["base"]: evaluate.generate_images(studio, [asked], None)}
    for model, other in evaluate.iterate_models(studio, evaluate.find_adapters()):
        columns[COLUMNS[model]] = evaluate.generate_images(other, [asked], identities)
    pictures = [to_pil(images) for images in columns.values()]
    rows = [(asked[k].prompt, [column[k] for column in pictures]) for k in range(people)]
    return labeled_grid(
        "One person in each row, who took no part in any training", list(columns), rows, side
    )


def sweep_recipes() -> dict[str, Recipe]:
    """What the sweep trains: stage 2 with gradients through other numbers of steps, stage 3 with other weights."""
    made = {f"k={last}": replace(find_recipe("mini_stage2"), last=last) for last in LAST}
    stage3 = find_recipe("mini_stage3")
    return made | {
        f"sem {a:g}, layout {b:g}": replace(stage3, semantic=a, layout=b) for a, b in ALIGNMENT
    }


def sweep(
    steps: int,
    people: int,
    *,
    runs: Path = Path("runs/mini"),
    weights: Path = MINIATURE,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Table:
    """Trains every variant so many steps from the adapter that its recipe begins with, and measures them all.

    Args:
        steps: of each; their rate rises and falls in them as in a whole training.
        people: held-out ones, a prompt each.
        runs: variants are kept below it, and one that is there by the same recipe is not trained again.
        weights: of the miniature.
    """
    adapters: dict[str, Path] = {}
    for name, recipe in sweep_recipes().items():
        folder = runs / "sweep" / name.replace(", ", "-").replace(" ", "")
        file = folder / "adapter.safetensors"
        short = replace(
            recipe, warmup=max(1, steps // 20), ema=0.98, steps=min(steps, recipe.steps)
        )
        if not file.exists() or json.loads(read_metadata(file)["recipe"]) != json.loads(
            json.dumps(asdict(short))
        ):
            begin = adapter.beginning(recipe.begin or "", runs / "any", weights)
            say(f"{name}: {steps} steps")
            adapter.train(
                short,
                folder,
                begin=begin,
                runs=runs,
                weights=weights,
                device=device,
                fresh=file.exists(),
            )
        adapters[name] = file
    return evaluate.run(people, prompts=1, preset=PRESET, adapters=adapters, device=device)


def plot(table: Table, path: Path) -> None:
    """Identity against purity, up and right is better: the numbers of steps above, the weights below, with 95% intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    titles = {
        "k": "stage 2, gradients through the last k of 4 steps",
        "sem": "stage 3, weights of the alignment",
    }
    for row, (part, title) in zip(figure.subplots(2, 2), titles.items(), strict=True):
        names = [name for name in sweep_recipes() if name.startswith(part) and name in table.rows]
        for axes, (purity, label) in zip(row, PURITY.items(), strict=True):
            _plot_points(axes, table.rows, names, purity)
            axes.set(title=title, xlabel=label, ylabel="face similarity")
            axes.grid(alpha=0.3)
        row[1].invert_xaxis()
    figure.savefig(path, dpi=100)


def _plot_points(
    axes: Any,
    rows: Mapping[str, Mapping[str, evaluate.Interval]],
    names: Sequence[str],
    purity: str,
) -> None:
    for name in names:
        x, y = rows[name][purity], rows[name]["face_sim"]
        reach = {
            "xerr": [[x.mean - x.low], [x.high - x.mean]],
            "yerr": [[y.mean - y.low], [y.high - y.mean]],
        }
        axes.errorbar(x.mean, y.mean, **reach, marker="o", markersize=7, elinewidth=0.6, label=name)
    axes.legend(fontsize=8)
