"""Evaluation of the miniature on people and scenes held out of training: one row per model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpulid.bench import metrics
from openpulid.bench.metrics import Interval, MetricInputs
from openpulid.identity.identity import Identity
from openpulid.io.image_grid import to_pil
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.mini.models.pipeline import sample
from openpulid.pipelines.presets import MINIATURE, find_preset
from openpulid.pipelines.studio import Studio, load
from openpulid.world import ATTRIBUTES, HELD_OUT_PEOPLE, Person, Scene, render

COLUMNS = ("face_sim", "rank1", "clip_t", "clip_i", "outside_face", "attributes", "face_found")
DIGITS = {"clip_t": 2}
"""Decimal places of a column in the printed table; 3 by default."""
BATCH = 16
"""Images per call of the pipeline."""
MODELS = ("stage1", "naive", "stage2", "stage3")
"""Adapters in the order of the table, if they exist."""


@dataclass(frozen=True)
class EvalPrompt:
    """One image that every model generates.

    Attributes:
        person: index of the person.
        prompt: the prompt.
        seed: the seed of the initial noise.
        scene: the scene that the prompt describes.
    """

    person: int
    prompt: str
    seed: int
    scene: Scene

    @property
    def wanted(self) -> dict[str, int]:
        """Attribute -> index of the class that should be visible."""
        return {
            name: ATTRIBUTES[name].index(value) for name, value in self.scene.attributes().items()
        }


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


def sample_prompts(people: int, prompts: int, people_seed: int = 0) -> list[EvalPrompt]:
    """Sample prompts of held-out scenes; each mentions all visible attributes.

    Prompt and seed only depend on the person and the index of the image, so they are the same for
    every model and machine.

    Args:
        people: number of people.
        prompts: prompts per person.
        people_seed: the first person, from `HELD_OUT_PEOPLE`.
    """
    eval_prompts = []
    for person in range(people):
        generator = torch.Generator().manual_seed(HELD_OUT_PEOPLE + people_seed + person)
        for _ in range(prompts):
            scene = Scene.sample(generator, held_out=True)
            seed = int(torch.randint(2**31, (), generator=generator))
            prompt = scene.prompt(generator, keep=1.0)
            eval_prompts.append(EvalPrompt(person, prompt, seed, scene))
    return eval_prompts


def render_portraits(people: int, people_seed: int = 0) -> Tensor:
    """Render the reference images, neutral portraits (people, 3, 96, 96)."""
    return torch.cat([_render(k, Scene(), people_seed) for k in range(people)])


def render_ground_truth(
    prompts: Sequence[EvalPrompt], people: int, people_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Render what a perfect method would generate with and without identity.

    Args:
        prompts: B prompts.
        people: number of people.
        people_seed: the first person, from `HELD_OUT_PEOPLE`.

    Returns:
        The scene of each prompt with its person, and with another person; (B, 3, 96, 96) each.
    """
    with_identity = [_render(p.person, p.scene, people_seed) for p in prompts]
    without = [_render((p.person + people // 2) % people, p.scene, people_seed) for p in prompts]
    return torch.cat(with_identity), torch.cat(without)


def _render(person: int, scene: Scene, people_seed: int) -> Tensor:
    return render([Person.from_seed(HELD_OUT_PEOPLE + people_seed + person)], [scene]).image


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
        preset: "mini", or "mini-lightning" for the four steps of the student.
        scale: identity scale. By default that of the training, not the preset's, which suits one
            adapter.
        adapters: model -> file; by default those of `find_adapters`.
        device: where to compute; the best device by default.
        progress: iterates over the batches of a model and may show its progress.
    """
    eval_prompts = sample_prompts(people, prompts, people_seed)
    portraits = render_portraits(people, people_seed)
    studio = load(find_preset(preset).with_defaults(scale=scale), device=device)
    scorers = MiniScorers.load()
    identities = [studio.identify([portrait]) for portrait in to_pil(portraits)]
    batches = [eval_prompts[start : start + BATCH] for start in range(0, len(eval_prompts), BATCH)]

    def score(images: Tensor, base_images: Tensor) -> dict[str, Interval]:
        columns = compute_metrics(scorers, eval_prompts, portraits, images, base_images)
        return summarize(columns, eval_prompts)

    base_images = generate_images(studio, progress(batches, "base"), None)
    rows = {"base": score(base_images, base_images)}
    adapters = find_adapters() if adapters is None else adapters
    for model, model_studio in iterate_models(studio, adapters):
        images = generate_images(model_studio, progress(batches, model), identities)
        rows[model] = score(images, base_images)
    rows["truth"] = score(*render_ground_truth(eval_prompts, people, people_seed))
    return Table(rows, people, prompts, people_seed, preset, scale)


def find_adapters(weights: Path = MINIATURE, runs: Path = Path("runs/mini")) -> dict[str, Path]:
    """Return model -> file for all `MODELS` that are shipped in `weights` or trained in `runs`."""
    adapters = {}
    for model in MODELS:
        shipped = weights / f"pulid-{model}.safetensors"
        trained = runs / model / "adapter.safetensors"
        for file in (shipped, trained):
            if file.exists():
                adapters[model] = file
                break
    return adapters


def iterate_models(studio: Studio, adapters: Mapping[str, Path]) -> Iterator[tuple[str, Studio]]:
    """Yield the name of each model and a studio with its adapter."""
    for model, file in adapters.items():
        adapter = PuLID.load(file).to(studio.pipe.device)
        yield model, Studio(studio.pipe, adapter, studio.extractor, studio.preset)


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
                    guidance=defaults.guidance_scale or 0.0,
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
) -> dict[str, Tensor]:
    """Compute all metrics for all images of one model.

    Args:
        scorers: the metric networks.
        prompts: B prompts.
        portraits: (P, 3, H, W), one per person.
        images: (B, 3, H, W) of the model, in the order of `prompts`.
        base_images: (B, 3, H, W) of the base model with the same seeds.

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
    )
    return {metric.name: metric(inputs).cpu() for metric in scorers.metrics()}


def summarize(columns: Mapping[str, Tensor], prompts: Sequence[EvalPrompt]) -> dict[str, Interval]:
    """Compute the mean over people of each column, with confidence intervals."""
    person = torch.tensor([prompt.person for prompt in prompts])
    return {name: metrics.bootstrap(values, person) for name, values in columns.items()}


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
    grid.add_column("model", no_wrap=True)
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
