"""The miniature measured on people and prompts that no training has seen: a row for each model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
DIGITS = {"clip_t": 2}  # three elsewhere
BATCH = 16
MODELS = ("stage1", "naive", "stage2", "stage3")
"""Adapters that there may be, in the order of the table."""


@dataclass(frozen=True)
class EvalPrompt:
    """One image that every model makes: whose, from which words and noise, and the scene that the words describe."""

    person: int
    prompt: str
    seed: int
    scene: Scene

    @property
    def wanted(self) -> dict[str, int]:
        """Attribute -> index of the value that must be seen."""
        return {
            name: ATTRIBUTES[name].index(value) for name, value in self.scene.attributes().items()
        }


@dataclass(frozen=True)
class Table:
    """What was measured: model -> column -> mean and interval, and on how much."""

    rows: Mapping[str, Mapping[str, Interval]]
    people: int
    prompts: int
    people_seed: int
    preset: str
    scale: float


Batches = Sequence[Sequence[EvalPrompt]]
Progress = Callable[[Batches, str], Iterable[Sequence[EvalPrompt]]]


def hide_progress(batches: Batches, model: str) -> Iterable[Sequence[EvalPrompt]]:
    """The batches, nothing shown."""
    return batches


def show_progress(batches: Batches, model: str) -> Iterable[Sequence[EvalPrompt]]:
    """The batches, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    return track(batches, description=f"{model:>8}", console=Console(stderr=True))


def sample_prompts(people: int, prompts: int, people_seed: int = 0) -> list[EvalPrompt]:
    """`prompts` images of each person; scenes from combinations held out of training, every attribute named.

    Prompt and noise belong to the person and the image's number: the same for every model and machine.
    """
    made = []
    for person in range(people):
        generator = torch.Generator().manual_seed(HELD_OUT_PEOPLE + people_seed + person)
        for _ in range(prompts):
            scene = Scene.sample(generator, held_out=True)
            seed = int(torch.randint(2**31, (), generator=generator))
            made.append(EvalPrompt(person, scene.prompt(generator, keep=1.0), seed, scene))
    return made


def render_portraits(people: int, people_seed: int = 0) -> Tensor:
    """(people, 3, 96, 96) neutral portraits: what identities are made from and faces compared with."""
    return torch.cat([_render(k, Scene(), people_seed) for k in range(people)])


def render_ground_truth(
    asked: Sequence[EvalPrompt], people: int, people_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """What a perfect method would give with and without an identity, each (B, 3, 96, 96): the world's own drawing of each
    request's scene, with its person and with another of the table's."""
    with_identity = [_render(r.person, r.scene, people_seed) for r in asked]
    without = [_render((r.person + people // 2) % people, r.scene, people_seed) for r in asked]
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
    """Make every model's images and measure them; the last row is that of `truth`.

    Args:
        people: how many, from the first held-out person + `people_seed` on.
        prompts: images of each person and model.
        preset: "mini", or "mini-lightning" for the student's four steps.
        scale: how strongly the identity acts. Not the preset's, which suits one adapter: as strongly as it was trained.
        adapters: model -> file; by default those of `trained`.
        device: where to compute; the best there is by default.
        progress: passes a model's batches on, and may show how far it is.
    """
    asked, portraits = (
        sample_prompts(people, prompts, people_seed),
        render_portraits(people, people_seed),
    )
    studio, judges = (
        load(replace(find_preset(preset), scale=scale), device=device),
        MiniScorers.load(),
    )
    identities = [studio.identify([portrait]) for portrait in to_pil(portraits)]
    batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
    before = generate_images(studio, progress(batches, "base"), None)
    rows = {"base": summarize(compute_metrics(judges, asked, portraits, before, before), asked)}
    for model, other in iterate_models(studio, find_adapters() if adapters is None else adapters):
        after = generate_images(other, progress(batches, model), identities)
        rows[model] = summarize(compute_metrics(judges, asked, portraits, after, before), asked)
    rows["truth"] = summarize(
        compute_metrics(judges, asked, portraits, *render_ground_truth(asked, people, people_seed)),
        asked,
    )
    return Table(rows, people, prompts, people_seed, preset, scale)


def find_adapters(weights: Path = MINIATURE, runs: Path = Path("runs/mini")) -> dict[str, Path]:
    """Each of `MODELS` whose adapter is shipped among the weights, or has been trained in `runs`, and its file."""
    places = {
        model: (weights / f"pulid-{model}.safetensors", runs / model / "adapter.safetensors")
        for model in MODELS
    }
    there = {model: [file for file in files if file.exists()] for model, files in places.items()}
    return {model: files[0] for model, files in there.items() if files}


def iterate_models(studio: Studio, adapters: Mapping[str, Path]) -> Iterator[tuple[str, Studio]]:
    """Each model's name, and the studio with its adapter in place of its own."""
    for model, file in adapters.items():
        adapter = PuLID.load(file).to(studio.pipe.device)
        yield model, Studio(studio.pipe, studio.features, adapter, studio.preset)


def generate_images(
    studio: Studio, batches: Iterable[Sequence[EvalPrompt]], identities: Sequence[Identity] | None
) -> Tensor:
    """One image for each request, (B, 3, H, W) in [0, 1]; without identities the base model's.

    Many at once, each with its own prompt, noise and person: what `Studio.generate` gives one by one, up to rounding.
    """
    p, made = studio.preset, []
    for batch in batches:
        shown: AbstractContextManager[Any] = nullcontext()
        if identities and studio.adapter:
            people = [identities[request.person] for request in batch]
            shown = studio.adapter.use(people, **p.identity_options(), pipe=studio.pipe)
        with shown:
            prompts, seeds = [r.prompt for r in batch], [r.seed for r in batch]
            made.append(
                sample(
                    studio.pipe,
                    prompts,
                    seeds,
                    steps=p.steps,
                    guidance=p.guidance,
                    batch=len(batch),
                )
            )
    return torch.cat(made)


@torch.no_grad()
def compute_metrics(
    judges: MiniScorers,
    asked: Sequence[EvalPrompt],
    portraits: Tensor,
    images: Tensor,
    before: Tensor,
) -> dict[str, Tensor]:
    """Every column for every image of one model.

    Args:
        portraits: (P, 3, H, W), one for each person.
        images: (B, 3, H, W) of the model, in the order of `asked`.
        before: (B, 3, H, W) of the base model at the same seeds.

    Returns:
        column -> (B,).
    """
    evidence = MetricInputs(
        images=images,
        before=before,
        seen=judges.faces(images),
        was=judges.faces(before),
        person=torch.tensor([request.person for request in asked]),
        portraits=portraits,
        gallery=judges.faces(portraits),
        prompts=[request.prompt for request in asked],
        wanted=[request.wanted for request in asked],
    )
    return {measure.name: measure(evidence).cpu() for measure in judges.measures()}


def summarize(columns: Mapping[str, Tensor], asked: Sequence[EvalPrompt]) -> dict[str, Interval]:
    """Means over people, with their intervals."""
    person = torch.tensor([request.person for request in asked])
    return {name: metrics.bootstrap(values, person) for name, values in columns.items()}


def to_json(table: Table) -> dict[str, Any]:
    """The last line: means under the columns' names, 95% intervals under "intervals"."""
    rows = []
    for model, columns in table.rows.items():
        means = {name: _round(interval.mean, 5) for name, interval in columns.items()}
        ranges = {name: [_round(i.low, 5), _round(i.high, 5)] for name, i in columns.items()}
        rows.append({"model": model, **means, "intervals": ranges})
    how = {
        name: getattr(table, name)
        for name in ("people", "prompts", "people_seed", "preset", "scale")
    }
    return {"rows": rows, **how}


def print_table(table: Table) -> None:
    """The table for people, on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    title = f"{table.people} people nobody trained on, prompts for each: {table.prompts}"
    grid = RichTable(title=title, box=box.SIMPLE, pad_edge=False)
    grid.add_column("model", no_wrap=True)
    for name in COLUMNS:
        grid.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for model, columns in table.rows.items():
        grid.add_row(model, *(_format_interval(name, columns[name]) for name in COLUMNS))
    Console().print(grid)


def _format_interval(name: str, interval: Interval) -> str:
    digits = DIGITS.get(name, 3)
    half = (interval.high - interval.low) / 2
    return f"{interval.mean:.{digits}f}" + ("" if math.isnan(half) else f"\n± {half:.{digits}f}")


def _round(value: float, digits: int) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(value, digits)
