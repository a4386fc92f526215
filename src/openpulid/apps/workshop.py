"""The commands of those who train and measure: world, mini, train, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from openpulid.apps.common import AsJson, Device, counted, group, last_line, picture_file, save_picture
from openpulid.errors import OptionError

world = group("Procedural people: pictures to start from.")
mini = group("The miniature: train it from nothing, measure it.")
bench = group("What things cost.")


@world.command()
def person(
    seed: Annotated[int, typer.Option(min=0, help="Who; from 1000000 on nobody trained on them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")],
    size: Annotated[int, typer.Option(min=32, max=1024, help="Pixels; 96 is what the miniature knows.")] = 96,
) -> None:
    """One picture of one procedural person: something to start from."""
    from openpulid.mini.showcase import portrait

    save_picture(portrait(seed, size), picture_file(out))
    print(out)


@world.command()
def sheet(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")],
    seed: Annotated[int, typer.Option(min=0, help="The first person.")] = 0,
    size: Annotated[int, typer.Option(min=32, max=512, help="Pixels of each picture.")] = 160,
) -> None:
    """Eight people in eight scenes: one person along each row."""
    from openpulid.mini.showcase import people_sheet

    save_picture(people_sheet(seed, size), picture_file(out))
    print(out)


@world.command()
def words() -> None:
    """What a prompt for the miniature can say: each thing and its kinds, then every single word."""
    from openpulid.world import ATTRIBUTES, VOCABULARY

    for name, kinds in ATTRIBUTES.items():
        print(f"{name.replace('_', ' ')}: {', '.join(kinds)}")
    print(f"\n{' '.join(word for word in VOCABULARY if word.isalpha())}")


@mini.command()
def build(
    part: Annotated[list[str] | None, typer.Argument(help="Parts in order; all by default.")] = None,
    minutes: Annotated[float | None, typer.Option(help="For all of them together.")] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Continue what was begun, or begin again.")] = True,
) -> None:
    """Train the miniature from nothing; a build that was stopped goes on where it was."""
    from openpulid.mini import build as builder

    builder.build(part or None, minutes=minutes, device=device, fresh=not resume)


@mini.command()
def evaluate(
    people: Annotated[int, typer.Option(min=2, help="How many people nobody trained on.")] = 64,
    people_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts for each.")] = 4,
    preset: Annotated[str, typer.Option(help="mini, or mini-lightning for four steps.")] = "mini",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the miniature on people and prompts that no training has seen."""
    from openpulid.mini import evaluate as measure

    bar = measure.silent if as_json else measure.progress
    table = measure.run(people, people_seed=people_seed, prompts=prompts, preset=preset, device=device, progress=bar)
    if not as_json:
        measure.show(table)
    last_line(measure.as_json(table))


def train(
    recipe: Annotated[str, typer.Argument(help="Such as mini_stage1.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder; runs/RECIPE by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; the recipe's by default.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after about this long, with the tail done.")] = None,
    device: Device = None,
    begin: Annotated[Path | None, typer.Option(help="The adapter to start from, where the recipe continues one.")] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Continue what was begun, or begin again.")] = True,
) -> None:
    """Train an adapter by a named recipe."""
    from openpulid.training.recipe import find

    chosen = find(recipe)
    from openpulid.mini import adapter

    folder = out or Path("runs") / recipe
    adapter.train(chosen, folder, steps=steps, minutes=minutes, device=device, fresh=not resume, begin=begin)


@bench.command("train")
def bench_train(
    base: Annotated[str, typer.Option(help="mini or sdxl, at full size.")] = "mini",
    random: Annotated[bool, typer.Option("--random", help="Random weights: a step costs the same with any.")] = False,
    recipe: Annotated[str | None, typer.Option(help="BASE_stage3 by default.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures of the diffusion branch; the recipe's by default.")] = None,
    fast_batch: Annotated[int | None, typer.Option(min=1, help="Pictures of each pair of the lightning branch.")] = None,
    pixels: Annotated[int | None, typer.Option(help="Width of the lightning branch's pictures.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each candidate, by turns.")] = 5,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time and memory of a training step, with gradients through the last 1 to 4 steps, kept or computed again."""
    from dataclasses import asdict, replace

    import torch

    from openpulid.bench import training

    if not random:
        raise OptionError("a step costs the same with any weights; say --random, and none are looked for.")
    from openpulid.loading import best_device
    from openpulid.training.recipe import find

    chosen = torch.device(device) if device else best_device()
    known = find(recipe or f"{base}_stage3")
    sizes: dict[str, Any] = {"batch": batch, "fast_batch": fast_batch, "pixels": pixels}
    known = replace(known, **{name: value for name, value in sizes.items() if value})
    dtype = torch.float32 if base == "mini" else torch.bfloat16
    task = training.random_task(known, training.random_base(base, chosen, dtype))
    costs = training.measure(task, rounds=rounds, on_progress=None if as_json else counted)
    facts = {"base": base, "recipe": known.name, "batch": known.batch, "fast_batch": known.fast_batch, "device": str(chosen)}
    if not as_json:
        training.show(costs)
    last_line({**facts, "rows": [asdict(cost) for cost in costs]})
