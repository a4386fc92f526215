"""Evaluation of the miniature on people and scenes held out of training: one row per model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpulid import Identity
from openpulid.bench.metrics import Interval, MetricInputs, Rank1Of8, bootstrap
from openpulid.io.image_grid import to_pil
from openpulid.mini.evaluation.adapters import find_adapters, find_miniature, iterate_models
from openpulid.mini.evaluation.prompts import (
    EvalPrompt,
    render_ground_truth,
    render_portraits,
    sample_prompts,
)
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.mini.models import sample
from openpulid.pipelines.loading import load
from openpulid.pipelines.studio import Studio
from openpulid.world import HELD_OUT_PEOPLE

COLUMNS = ("face_sim", "rank1", "clip_t", "clip_i", "outside_face", "attributes", "face_found")
"""Columns of the printed table. The JSON also has `rank1_of_8`, `values` and `copy_paste`."""
DIGITS = {"clip_t": 2}
"""Decimal places of a column in the printed table; 3 by default."""
BATCH = 16
"""Images per call of the pipeline."""


@dataclass(frozen=True)
class Table:
    """Results of an evaluation and its configuration.

    Attributes:
        rows: model -> column -> mean and confidence interval.
    """

    rows: Mapping[str, Mapping[str, Interval]]
    people: int
    prompts: int
    people_seed: int
    preset: str
    scale: float


Batches = Sequence[Sequence[EvalPrompt]]
Progress = Callable[[Batches, str], Iterable[Sequence[EvalPrompt]]]


def hide_progress(batches: Batches, model: str) -> Iterable[Sequence[EvalPrompt]]:
    """Return the batches without showing progress."""
    return batches


def show_progress(batches: Batches, model: str) -> Iterable[Sequence[EvalPrompt]]:
    """Return the batches with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    return track(batches, description=f"{model:>8}", console=Console(stderr=True))


def run(
    people: int = 64,
    *,
    people_seed: int = 0,
    prompts: int = 4,
    preset: str = "mini",
    scale: float = 1.0,
    adapters: Mapping[str, Path] | None = None,
    device: str | None = None,
    progress: Progress = hide_progress,
) -> Table:
    """Generate and score the images of every model; the last row is the ground truth.

    Args:
        people: number of people.
        people_seed: the first person, from `HELD_OUT_PEOPLE`.
        prompts: images per person and model.
        preset: "mini" or "mini-flux"; "mini-lightning" or "mini-flux-4step" for the four steps of
            the student.
        scale: identity scale. By default that of the training, not the preset's, which suits one
            adapter.
        adapters: model -> file; by default those of `find_adapters`.
        device: where to compute; the best device by default.
        progress: iterates over the batches of a model and may show its progress.
    """
    eval_prompts = sample_prompts(people, prompts, people_seed)
    portraits = render_portraits(people, people_seed)
    selected = find_miniature(preset).with_defaults(scale=scale)
    adapters = find_adapters(selected.models.family) if adapters is None else adapters
    # the preset's own adapter need not exist
    studio = load(selected, device=device, adapter=next(iter(adapters.values()), None))
    scorers = MiniScorers.load()
    seeds = range(HELD_OUT_PEOPLE + people_seed, HELD_OUT_PEOPLE + people_seed + people)
    facial_values = scorers.facial_values([str(seed) for seed in seeds])
    identities = [studio.identify([portrait]) for portrait in to_pil(portraits)]
    batches = [eval_prompts[start : start + BATCH] for start in range(0, len(eval_prompts), BATCH)]

    def score(images: Tensor, base_images: Tensor) -> dict[str, Interval]:
        columns = compute_metrics(
            scorers, eval_prompts, portraits, images, base_images, facial_values
        )
        return summarize(columns, eval_prompts)

    base_images = generate_images(studio, progress(batches, "base"), None)
    rows = {"base": score(base_images, base_images)}
    for model, model_studio in iterate_models(studio, adapters):
        images = generate_images(model_studio, progress(batches, model), identities)
        rows[model] = score(images, base_images)
    rows["truth"] = score(*render_ground_truth(eval_prompts, people, people_seed))
    return Table(rows, people, prompts, people_seed, preset, scale)


def generate_images(
    studio: Studio, batches: Iterable[Sequence[EvalPrompt]], identities: Sequence[Identity] | None
) -> Tensor:
    """Generate one image per prompt, (B, 3, H, W) in [0, 1].

    Images of a batch have their own prompts, seeds and people. Up to rounding they equal those that
    `Studio.generate` generates one by one.

    Args:
        studio: the models and their options.
        batches: the prompts.
        identities: one per person; None generates the images of the base model.
    """
    defaults = studio.preset.defaults
    options = defaults.identity.model_dump(exclude_none=True)
    is_flux = studio.preset.models.has_transformer
    guidance = defaults.true_cfg_scale if is_flux else defaults.guidance_scale
    images = []
    for batch in batches:
        context: AbstractContextManager[Any] = nullcontext()
        if identities:
            people = [identities[prompt.person] for prompt in batch]
            context = studio.adapter.use(people, **options, pipe=studio.pipe)
        with context:
            images.append(
                sample(
                    studio.pipe,
                    [prompt.prompt for prompt in batch],
                    [prompt.seed for prompt in batch],
                    steps=defaults.num_inference_steps or 1,
                    guidance=guidance or 0.0,
                    batch=len(batch),
                )
            )
    return torch.cat(images)


@torch.no_grad()
def compute_metrics(
    scorers: MiniScorers,
    prompts: Sequence[EvalPrompt],
    portraits: Tensor,
    images: Tensor,
    base_images: Tensor,
    facial_values: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute all metrics for all images of one model.

    Args:
        scorers: the metric networks.
        prompts: B prompts.
        portraits: (P, 3, H, W), one per person.
        images: (B, 3, H, W) of the model, in the order of `prompts`.
        base_images: (B, 3, H, W) of the base model with the same seeds.
        facial_values: (P, V), the true facial parameters of the people.

    Returns:
        column -> (B,).
    """
    inputs = MetricInputs(
        images=images,
        base_images=base_images,
        faces=scorers.faces(images),
        base_faces=scorers.faces(base_images),
        subjects=torch.tensor([prompt.person for prompt in prompts]),
        reference_images=portraits,
        reference_faces=scorers.faces(portraits),
        prompts=[prompt.prompt for prompt in prompts],
        requested=[prompt.wanted for prompt in prompts],
        facial_values=facial_values,
    )
    metrics = [*scorers.metrics(), Rank1Of8()]
    return {metric.name: metric(inputs).cpu() for metric in metrics}


def summarize(columns: Mapping[str, Tensor], prompts: Sequence[EvalPrompt]) -> dict[str, Interval]:
    """Compute the mean over people of each column, with confidence intervals."""
    person = torch.tensor([prompt.person for prompt in prompts])
    return {name: bootstrap(values, person) for name, values in columns.items()}


def to_json(table: Table) -> dict[str, Any]:
    """Convert a table to JSON: means by column, and 95% intervals under "intervals"."""
    rows = []
    for model, columns in table.rows.items():
        means = {name: _round(interval.mean, 5) for name, interval in columns.items()}
        ranges = {name: [_round(i.low, 5), _round(i.high, 5)] for name, i in columns.items()}
        rows.append({"model": model, **means, "intervals": ranges})
    options = ("people", "prompts", "people_seed", "preset", "scale")
    return {"rows": rows, **{name: getattr(table, name) for name in options}}


def print_table(table: Table) -> None:
    """Print a table on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    title = f"{table.people} people held out of training, {table.prompts} prompts each"
    grid = RichTable(title=title, box=box.SIMPLE, pad_edge=False)
    grid.add_column("model", overflow="fold")  # can be a long path
    for name in COLUMNS:
        grid.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for model, columns in table.rows.items():
        grid.add_row(model, *(_format_interval(name, columns[name]) for name in COLUMNS))
    Console().print(grid)


def _format_interval(name: str, interval: Interval) -> str:
    digits = DIGITS.get(name, 3)
    mean = f"{interval.mean:.{digits}f}"
    half_width = (interval.high - interval.low) / 2
    return mean if math.isnan(half_width) else f"{mean}\n± {half_width:.{digits}f}"


def _round(value: float, digits: int) -> float | None:
    """Round a number, or return None for NaN, which JSON does not have."""
    return None if math.isnan(value) else round(value, digits)
