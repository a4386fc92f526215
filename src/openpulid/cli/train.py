"""The commands of those who train: world, mini, train."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid.cli.options import AsJson, Device, group, last_line, picture_file, say, silent
from openpulid.errors import OptionError
from openpulid.io.metadata import save_image

if TYPE_CHECKING:
    from openpulid.training.pulid.recipes import Recipe

world = group("Procedural people: pictures to start from.")
mini = group("The miniature: train it from nothing, measure it.")


@world.command()
def person(
    seed: Annotated[int, typer.Option(min=0, help="Who; from 1000000 on nobody trained on them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")],
    size: Annotated[
        int, typer.Option(min=32, max=1024, help="Pixels; 96 is what the miniature knows.")
    ] = 96,
) -> None:
    """One picture of one procedural person: something to start from."""
    from openpulid.world.gallery import render_portrait

    save_image(render_portrait(seed, size), picture_file(out))
    print(out)


@world.command()
def sheet(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")],
    seed: Annotated[int, typer.Option(min=0, help="The first person.")] = 0,
    size: Annotated[int, typer.Option(min=32, max=512, help="Pixels of each picture.")] = 160,
) -> None:
    """Eight people in eight scenes: one person along each row."""
    from openpulid.world.gallery import render_people_sheet

    save_image(render_people_sheet(seed, size), picture_file(out))
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
    part: Annotated[
        list[str] | None, typer.Argument(help="Parts in order; all by default.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="A rival instead: faceid, instantid or photomaker.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="For all of them together.")] = None,
    device: Device = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Continue what was begun, or begin again.")
    ] = True,
) -> None:
    """Train the miniature from nothing; a build that was stopped goes on where it was."""
    from openpulid.mini.train import build as builder

    names = [*(part or []), *([method] if method else [])]
    builder.build(names or None, minutes=minutes, device=device, fresh=not resume)


@mini.command()
def evaluate(
    people: Annotated[int, typer.Option(min=2, help="How many people nobody trained on.")] = 64,
    people_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts for each.")] = 4,
    preset: Annotated[str, typer.Option(help="mini, or mini-lightning for four steps.")] = "mini",
    scale: Annotated[
        float, typer.Option(min=0, help="How strongly the identity acts; it is trained at 1.")
    ] = 1.0,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="A file to measure in place of those that are here; several."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the miniature on people and prompts that no training has seen."""
    from openpulid.mini.evaluation import evaluate as measure

    bar = measure.hide_progress if as_json else measure.show_progress
    asked: dict[str, Any] = {
        "people_seed": people_seed,
        "prompts": prompts,
        "preset": preset,
        "scale": scale,
    }
    for file in adapter or ():  # said before minutes of images
        if not file.is_file():
            raise OptionError(f"{file} is not there; name the file of an adapter.")
    chosen = {str(file): file for file in adapter} if adapter else None
    table = measure.run(people, **asked, adapters=chosen, device=device, progress=bar)
    if not as_json:
        measure.print_table(table)
    last_line(measure.to_json(table))


@mini.command()
def ablation(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")],
    people: Annotated[int, typer.Option(min=1, help="Rows.")] = 6,
    people_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
) -> None:
    """People nobody trained on, each with the same prompt and seed through every stage of the training."""
    from openpulid.mini.evaluation import ablation as stages

    save_image(stages.draw_stages(people, people_seed), picture_file(out))
    print(out)


@mini.command()
def sweep(
    out: Annotated[Path, typer.Option("--out", "-o", help="The plot to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 100,
    people: Annotated[int, typer.Option(min=2, help="How many people nobody trained on.")] = 64,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train with other numbers of steps that carry gradient, and other weights of the alignment; plot identity and purity."""
    from openpulid.mini.evaluation import ablation as stages
    from openpulid.mini.evaluation import evaluate as measure

    table = stages.sweep(steps, people, device=device, log=silent if as_json else say)
    stages.plot(table, picture_file(out))
    if not as_json:
        measure.print_table(table)
    last_line(measure.to_json(table))


def train(
    recipe: Annotated[str, typer.Argument(help="Such as mini_stage1 or sdxl_stage1.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder; runs/RECIPE by default.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps; the recipe's by default.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after about this long, with the tail done.")
    ] = None,
    device: Device = None,
    begin: Annotated[
        Path | None, typer.Option(help="The adapter to start from, where the recipe continues one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Continue what was begun, or begin again.")
    ] = True,
    data: Annotated[
        Path | None, typer.Option(help="sdxl: a folder of pictures, a NAME.txt beside each.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="sdxl: the same, of people who are not trained on.")
    ] = None,
    base: Annotated[
        str, typer.Option(help="sdxl: the checkpoint of the diffusion branch.")
    ] = "sdxl-base",
    fast: Annotated[
        list[str] | None,
        typer.Option(help="sdxl: of the lightning branch; several are taken by turns."),
    ] = None,
    faces: Annotated[
        Path | None, typer.Option(help="sdxl: folder of another insightface pack to learn with.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures of a step, over all processes.")
    ] = None,
    fast_batch: Annotated[
        int | None, typer.Option(min=1, help="Of them in the lightning branch.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Parts of a step, made one by one for less memory.")
    ] = None,
) -> None:
    """Train an adapter by a named recipe."""
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
            f"{recipe} learns from photographs: name a folder with --data, each NAME.jpg with a NAME.txt."
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
    from dataclasses import replace

    import torch

    from openpulid.device import best_device, supports_bf16
    from openpulid.faces.arcface import build_face_embedder, load_arcface_ir_se50
    from openpulid.pipelines.factory import load_extractor, load_pipeline, resolve_path
    from openpulid.pipelines.presets import sdxl, sdxl_v1
    from openpulid.pipelines.studio import resolve_preset
    from openpulid.training.pulid import train_sdxl as full
    from openpulid.training.pulid.models import SDXLModel

    chosen = torch.device(device) if device else best_device()
    lightning = sdxl_v1()
    presets = [replace(resolve_preset(sdxl(base), faces=faces), sampler="")]
    if recipe.fast_batch:
        presets += [
            replace(lightning, pipeline=name, unet=None, sampler="") for name in fast or []
        ] or [lightning]
    for preset in presets:
        _ = [resolve_path(place) for place in preset.published if place != preset.adapter]
    loss = resolve_path("arcface-loss") if recipe.id_loss != "none" else None
    features = load_extractor(presets[0], chosen)
    half = supports_bf16(
        chosen
    )  # a GPU without bfloat16 trains in float32, where it has the memory: float16 overflows
    bases = [SDXLModel(load_pipeline(replace(preset, half=half), chosen)) for preset in presets]
    judge = None
    if loss is not None:
        detector = features.finder  # type: ignore[attr-defined]
        judge = build_face_embedder(detector, load_arcface_ir_se50(loss, chosen))
    full.train(
        recipe,
        data,
        folder,
        base=bases[0],
        fast=bases[1:],
        features=features,  # type: ignore[arg-type]
        faces=judge,
        **known,
    )
