"""`pulid mini`: train and evaluate the miniature; and `pulid demo`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from openpulid.cli.options import (
    MAX_PEOPLE,
    MAX_PERSON,
    AsJson,
    Device,
    OutputDirectory,
    Overwrite,
    check_image_path,
    check_new_output,
    command_group,
    make_directory,
    print_json,
    print_nothing,
    print_path,
    print_status,
    write_image,
)
from openpulid.errors import OptionError

mini = command_group("The miniature: train it from scratch, evaluate it.")

HeldOutPeople = Annotated[
    int, typer.Option(min=2, max=MAX_PEOPLE, help="Number of held-out people.")
]
FirstPerson = Annotated[int, typer.Option(min=0, max=MAX_PERSON, help="The first held-out person.")]
MiniaturePreset = Annotated[
    str,
    typer.Option(help="mini, or mini-lightning for four steps; mini-flux, mini-flux-4step."),
]


@mini.command()
def build(
    part: Annotated[
        list[str] | None, typer.Argument(help="Parts to build, in order (default: all).")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Train a baseline instead: faceid, instantid, photomaker, face0, photoverse, "
            "fastcomposer, elite or w-plus; infiniteyou on mini-flux; or style, the adapter of "
            "`pulid generate --style`."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Time budget in minutes for all parts together.")
    ] = None,
    people: Annotated[
        int | None, typer.Option(min=8, help="Number of people in the training images.")
    ] = None,
    begin: Annotated[
        Path | None,
        typer.Option(help="Folder of a pipeline whose networks the base starts from."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Image tokens of flux-base: 36, or 144 of half the side.")
    ] = 36,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of the weights to read and write (default: the installed ones)."),
    ] = None,
    device: Device = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Continue an interrupted build, or start again."),
    ] = True,
) -> None:
    """Train the miniature from scratch, or continue an interrupted build."""
    from openpulid.mini.train import build as builder
    from openpulid.pipelines.presets import MINIATURE

    names = [*(part or []), *([method] if method else [])]
    builder.build(
        names or None,
        minutes,
        device,
        fresh=not resume,
        people=people,
        begin=begin,
        tokens=tokens,
        weights=weights or MINIATURE,
    )


@mini.command()
def evaluate(
    people: HeldOutPeople = 64,
    people_seed: FirstPerson = 0,
    prompts: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of prompts per person.")
    ] = 4,
    preset: MiniaturePreset = "mini",
    scale: Annotated[
        float, typer.Option(min=0, help="Identity scale; adapters are trained at 1.")
    ] = 1.0,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="Evaluate this adapter file instead of the installed ones; repeatable."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the miniature on held-out people and prompts."""
    from openpulid.mini.evaluation import evaluate as evaluation

    for file in adapter or ():
        if not file.is_file():
            raise OptionError(f"{file} does not exist: pass the file of an adapter.")
    table = evaluation.run(
        people,
        people_seed=people_seed,
        prompts=prompts,
        preset=preset,
        scale=scale,
        adapters={str(file): file for file in adapter} if adapter else None,
        device=device,
        progress=evaluation.hide_progress if as_json else evaluation.show_progress,
    )
    if not as_json:
        evaluation.print_table(table)
    print_json(evaluation.to_json(table))


@mini.command()
def ablation(
    out: Annotated[Path, typer.Option("--out", "-o", help="Image file to write.")],
    people: Annotated[
        int, typer.Option(min=1, max=100, help="Number of held-out people (rows).")
    ] = 6,
    people_seed: FirstPerson = 0,
    preset: MiniaturePreset = "mini-lightning",
    overwrite: Overwrite = False,
) -> None:
    """Draw held-out people with the same prompt and seed at every stage of the training."""
    from openpulid.io.xmp import DigitalSourceType
    from openpulid.mini.evaluation.stage_sheet import draw_stages

    check_new_output(check_image_path(out), overwrite)
    sheet = draw_stages(people, people_seed, preset=preset)
    write_image(out, sheet, overwrite, DigitalSourceType.GENERATED)
    print_path(out)


class Experiments(str, Enum):
    """What `pulid mini sweep` varies."""

    STAGES = "stages"
    FLUX_STAGE1 = "flux-stage1"


@mini.command()
def sweep(
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Plot file to write; flux-stage1: also a JSON file of this name."
        ),
    ],
    experiments: Annotated[
        Experiments,
        typer.Option(
            help="stages: gradient steps and alignment weights on SDXL's architecture; "
            "flux-stage1: when stage 1 converges on FLUX's."
        ),
    ] = Experiments.STAGES,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of each training (default: 100; flux-stage1: 300)."),
    ] = None,
    people: Annotated[
        int | None,
        typer.Option(
            min=2, max=MAX_PEOPLE, help="stages: number of held-out people (default: 64)."
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=2, help="flux-stage1: images per step (default: 16).")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="flux-stage1: only the recipe and this variant; repeatable."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="flux-stage1: folder of the weights (default: the installed ones)."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train short variants of a recipe with one change each, measure them and plot the results."""
    check_new_output(check_image_path(out), overwrite)
    log = print_nothing if as_json else print_status
    if experiments is Experiments.FLUX_STAGE1:
        if people is not None:
            raise OptionError("--people is only available for --experiments stages.")
        print_json(_sweep_flux(out, steps or 300, batch or 16, variant, weights, device, log))
        return
    for option, value in (("--batch", batch), ("--variant", variant), ("--weights", weights)):
        if value is not None:
            raise OptionError(f"{option} is only available for --experiments flux-stage1.")
    from openpulid.mini.evaluation import ablation as stages
    from openpulid.mini.evaluation import evaluate as evaluation

    table = stages.sweep(steps or 100, people or 64, device=device, log=log)
    stages.plot(table, out)
    if not as_json:
        evaluation.print_table(table)
    print_json(evaluation.to_json(table))


def _sweep_flux(
    out: Path,
    steps: int,
    batch: int,
    variants: list[str] | None,
    weights: Path | None,
    device: str | None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Run the experiments on FLUX's stage 1, write plot and JSON, and return the figures."""
    from openpulid.device import select_device
    from openpulid.mini.evaluation import flux_report, flux_stage1
    from openpulid.pipelines.presets import MINIATURE

    setup = flux_stage1.Experiments(
        steps, batch, Path("runs/mini"), weights or MINIATURE, select_device(device)
    )
    results = flux_stage1.run_experiments(setup, variants, log)
    flux_report.plot_curves(results, out)
    return flux_report.write_report(out.with_suffix(".json"), setup, results)


def demo(
    out: OutputDirectory = Path("demo"),
    people_seed: Annotated[
        int, typer.Option(min=0, max=MAX_PERSON, help="Which of the held-out people.")
    ] = 0,
    preset: MiniaturePreset = "mini",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Generate images of held-out synthetic people from one reference image each."""
    from openpulid.mini.evaluation import demo as demonstration

    outcome = demonstration.run(
        make_directory(out),
        people_seed=people_seed,
        preset=preset,
        device=device,
        log=print_nothing if as_json else print_status,
    )
    if not as_json:
        print_path(outcome.image)
        print_path(outcome.people)
        print_path(outcome.page)
    print_json(outcome.figures)
