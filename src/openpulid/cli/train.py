"""The commands `pulid world`, `pulid mini` and `pulid train`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from openpulid.cli.options import (
    AsJson,
    Device,
    check_image_path,
    command_group,
    print_json,
    print_nothing,
    print_status,
)
from openpulid.errors import OptionError
from openpulid.io.metadata import save_image

if TYPE_CHECKING:
    from openpulid.training.pulid.recipes import Recipe

world = command_group("Draw synthetic people.")
mini = command_group("Train and evaluate the miniature.")


@world.command()
def person(
    seed: Annotated[
        int, typer.Option(min=0, help="Number of the person; from 1000000 on, people are held out.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Image to write.")],
    size: Annotated[
        int, typer.Option(min=32, max=1024, help="Size in pixels; the miniature uses 96.")
    ] = 96,
) -> None:
    """Draw a reference image of a synthetic person."""
    from openpulid.world.gallery import portrait

    save_image(portrait(seed, size), check_image_path(out))
    print(out)


@world.command()
def sheet(
    out: Annotated[Path, typer.Option("--out", "-o", help="Image to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Number of the first person.")] = 0,
    size: Annotated[int, typer.Option(min=32, max=512, help="Size of each image in pixels.")] = 160,
) -> None:
    """Draw eight people in eight scenes, one person per row."""
    from openpulid.world.gallery import people_sheet

    save_image(people_sheet(seed, size), check_image_path(out))
    print(out)


@world.command()
def words() -> None:
    """List the vocabulary of the miniature's prompts."""
    from openpulid.world import ATTRIBUTES, VOCABULARY

    for name, kinds in ATTRIBUTES.items():
        print(f"{name.replace('_', ' ')}: {', '.join(kinds)}")
    print(f"\n{' '.join(word for word in VOCABULARY if word.isalpha())}")


@mini.command()
def build(
    part: Annotated[
        list[str] | None, typer.Argument(help="Stages in order; all by default.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Train a baseline instead: faceid, instantid or photomaker.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time budget in minutes for all stages.")
    ] = None,
    device: Device = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Continue an interrupted run, or start again.")
    ] = True,
) -> None:
    """Train the miniature from scratch; an interrupted build is continued."""
    from openpulid.mini.train import build as builder

    names = [*(part or []), *([method] if method else [])]
    builder.build(names or None, minutes=minutes, device=device, fresh=not resume)


@mini.command()
def evaluate(
    people: Annotated[int, typer.Option(min=2, help="Number of held-out people.")] = 64,
    people_seed: Annotated[int, typer.Option(min=0, help="Number of the first of them.")] = 0,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per person.")] = 4,
    preset: Annotated[str, typer.Option(help="mini, or mini-lightning (four steps).")] = "mini",
    scale: Annotated[
        float, typer.Option(min=0, help="Identity scale; adapters are trained at 1.")
    ] = 1.0,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="Adapter file to evaluate instead of the installed ones; repeatable."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the miniature on held-out people and prompts."""
    from openpulid.mini.evaluation import evaluate as measure

    bar = measure.silent if as_json else measure.progress
    asked: dict[str, Any] = {
        "people_seed": people_seed,
        "prompts": prompts,
        "preset": preset,
        "scale": scale,
    }
    for file in adapter or ():  # said before minutes of images
        if not file.is_file():
            raise OptionError(f"{file} does not exist; pass an adapter file.")
    chosen = {str(file): file for file in adapter} if adapter else None
    table = measure.run(people, **asked, adapters=chosen, device=device, progress=bar)
    if not as_json:
        measure.show(table)
    print_json(measure.as_json(table))


@mini.command()
def ablation(
    out: Annotated[Path, typer.Option("--out", "-o", help="Image to write.")],
    people: Annotated[int, typer.Option(min=1, help="Number of people, one per row.")] = 6,
    people_seed: Annotated[int, typer.Option(min=0, help="Number of the first of them.")] = 0,
) -> None:
    """Draw held-out people with the same prompt and seed through every training stage."""
    from openpulid.mini.evaluation import ablation as stages

    save_image(stages.picture(people, people_seed), check_image_path(out))
    print(out)


@mini.command()
def sweep(
    out: Annotated[Path, typer.Option("--out", "-o", help="Plot to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 100,
    people: Annotated[int, typer.Option(min=2, help="Number of held-out people.")] = 64,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare gradient steps and alignment weights; plot identity against preservation."""
    from openpulid.mini.evaluation import ablation as stages
    from openpulid.mini.evaluation import evaluate as measure

    table = stages.sweep(
        steps, people, device=device, say=print_nothing if as_json else print_status
    )
    stages.plot(table, check_image_path(out))
    if not as_json:
        measure.show(table)
    print_json(measure.as_json(table))


def train(
    recipe: Annotated[str, typer.Argument(help="Recipe, such as mini_stage1 or sdxl_stage1.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory; runs/RECIPE by default.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; the recipe's by default.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Time budget in minutes (the LR decay is always completed)."),
    ] = None,
    device: Device = None,
    begin: Annotated[
        Path | None, typer.Option(help="Adapter to start from, if the recipe continues one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Continue an interrupted run, or start again.")
    ] = True,
    data: Annotated[
        Path | None,
        typer.Option(help="sdxl: directory of images, each with a caption in NAME.txt."),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="sdxl: the same with held-out people.")
    ] = None,
    base: Annotated[
        str, typer.Option(help="sdxl: base model of the diffusion branch.")
    ] = "sdxl-base",
    fast: Annotated[
        list[str] | None,
        typer.Option(help="sdxl: few-step model of the lightning branch; several alternate."),
    ] = None,
    faces: Annotated[
        Path | None, typer.Option(help="sdxl: directory of another insightface pack.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per step, over all processes.")
    ] = None,
    fast_batch: Annotated[
        int | None, typer.Option(min=1, help="Images of the lightning branch among them.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches per step, for less memory.")
    ] = None,
) -> None:
    """Train an adapter with a named recipe."""
    from dataclasses import replace

    from openpulid.training.pulid.recipes import find_recipe

    chosen = find_recipe(recipe)
    given: dict[str, Any] = {"batch": batch, "fast_batch": fast_batch, "accumulate": accumulate}
    chosen = replace(chosen, **{name: number for name, number in given.items() if number})
    folder = out or Path("runs") / recipe
    shorten: dict[str, Any] = {"steps": steps, "minutes": minutes, "begin": begin}
    if chosen.base == "mini":
        from openpulid.mini.train import pulid as adapter

        adapter.train(chosen, folder, device=device, fresh=not resume, **shorten)
        return
    if data is None:
        raise OptionError(
            f"{recipe} trains on photos: pass a directory with --data, NAME.jpg and NAME.txt each."
        )
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    _train_full(
        chosen,
        data,
        folder,
        held_out=held_out,
        base=base,
        fast=fast,
        faces=faces,
        device=device,
        **shorten,
    )


def _train_full(
    recipe: Recipe,
    data: Path,
    folder: Path,
    *,
    base: str,
    fast: list[str] | None,
    faces: Path | None,
    device: str | None,
    **known: Any,
) -> None:
    """Looks for everything before anything large is opened."""
    import torch

    from openpulid.device import best_device, supports_bf16
    from openpulid.faces.arcface import arcface_ir_se50, photo_embedder
    from openpulid.identity.photo_extractor import PhotoExtractor
    from openpulid.pipelines.factory import load_extractor, load_pipeline
    from openpulid.pipelines.presets import sdxl, sdxl_v1
    from openpulid.pipelines.selection import resolve_preset
    from openpulid.pipelines.weights import resolve_path
    from openpulid.training.pulid import train_sdxl as full
    from openpulid.training.pulid.models import SDXLModel

    chosen = torch.device(device) if device else best_device()
    lightning = sdxl_v1()
    presets = [resolve_preset(sdxl(base), face_pack=faces).with_models(sampler=None)]
    if recipe.fast_batch:
        presets += [
            lightning.with_models(pipeline=name, unet=None, sampler=None) for name in fast or []
        ] or [lightning]
    for preset in presets:
        _ = [resolve_path(place) for place in preset.published if place != preset.models.adapter]
    loss = resolve_path("arcface-loss") if recipe.id_loss != "none" else None
    features = cast(PhotoExtractor, load_extractor(presets[0], chosen))
    half = supports_bf16(
        chosen
    )  # a GPU without bfloat16 trains in float32, where it has the memory: float16 overflows
    bases = [
        SDXLModel(load_pipeline(preset.with_models(use_half_precision=half), chosen))
        for preset in presets
    ]
    judge = (
        None if loss is None else photo_embedder(features.detector, arcface_ir_se50(loss, chosen))
    )
    full.train(
        recipe,
        data,
        folder,
        base=bases[0],
        fast=bases[1:],
        features=features,
        faces=judge,
        **known,
    )
