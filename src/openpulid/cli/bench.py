"""The `pulid bench` commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid.cli.options import (
    AsJson,
    Device,
    command_group,
    print_json,
    print_nothing,
    print_progress,
    print_status,
)
from openpulid.errors import OptionError, WeightsError

if TYPE_CHECKING:
    import torch

    from openpulid.bench.run_dir import Subject
    from openpulid.bench.score import Scorers
    from openpulid.bench.suite import Suite

bench = command_group("Compare methods, and measure time and memory.")

Rounds = Annotated[
    int, typer.Option(min=1, help="Number of rounds; candidates are interleaved in each.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="JSON file for the figures with command, date, revision, hardware and versions.",
    ),
]


@bench.command("run")
def run_suite(
    suite: Annotated[str, typer.Argument(help="miniature, quick, pulid-paper, or a JSON file.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Run directory; existing images are not generated again."),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated methods. METHOD:FILE uses another adapter file, METHOD@0.5 "
            "another scale. The base is always included."
        ),
    ] = "pulid",
    people: Annotated[
        Path | None, typer.Option(help="Folder of photos, for a suite without its own people.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Number of people; the suite's by default.")
    ] = None,
    workers: Annotated[
        str | None, typer.Option(help="Number of processes, or ray://HOST:PORT for a cluster.")
    ] = None,
    device: Device = None,
) -> None:
    """Generate all missing images, compute their metrics and write the report."""
    _check_libraries()
    from openpulid.bench.methods import check_weights, select_presets
    from openpulid.bench.run import run_benchmark
    from openpulid.bench.suite import load_suite

    loaded_suite = load_suite(suite)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    presets = select_presets(loaded_suite, names)
    check_weights(presets)
    paths = run_benchmark(
        loaded_suite,
        presets,
        _load_subjects(loaded_suite, people, count),
        _load_scorers(loaded_suite, device),
        out,
        workers=workers,
        device=device,
        on_progress=print_progress,
    )
    for path in paths:
        print_status(str(path))


@bench.command("report")
def report_run(
    run: Annotated[Path, typer.Argument(help="Run directory.")], as_json: AsJson = False
) -> None:
    """Write the report of a run as Markdown, JSON and HTML; compute missing metrics first."""
    _check_libraries()
    from openpulid.bench.run import update_report
    from openpulid.bench.run_dir import RunDir

    tell = print_nothing if as_json else print_status
    scorers = None
    try:
        scorers = _load_scorers(RunDir(run).load().suite, None, tell)
    except WeightsError as error:
        tell(f"no further metrics are computed: {error}")
    table, paths = update_report(run, scorers, write_files=not as_json)
    for path in paths:
        print_status(str(path))
    print_json(table)


@bench.command("train")
def measure_training(
    base: Annotated[str, typer.Option(help="mini or sdxl; full size, random weights.")] = "mini",
    recipe: Annotated[str | None, typer.Option(help="Recipe; BASE_stage3 by default.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch of the diffusion branch; the recipe's by default."),
    ] = None,
    few_step_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch of the lightning branch; the recipe's by default."),
    ] = None,
    pixels: Annotated[
        int | None, typer.Option(help="Width of the lightning branch's images.")
    ] = None,
    rounds: Rounds = 5,
    out: Output = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a training step: gradients through 1 to 4 steps, with and without checkpointing."""
    from openpulid.bench.perf import training
    from openpulid.training.pulid.recipes import find_recipe

    torch_device = _select_device(device)
    sizes: dict[str, Any] = {"batch": batch, "few_step_batch": few_step_batch, "pixels": pixels}
    changes = {name: value for name, value in sizes.items() if value}
    selected = replace(find_recipe(recipe or f"{base}_stage3"), **changes)
    dtype = training.dtype_of(base, torch_device)
    task = training.random_task(selected, training.random_base(base, torch_device, dtype))
    costs = training.measure(task, rounds=rounds, on_progress=None if as_json else print_progress)
    configuration = {
        "base": base,
        "recipe": selected.name,
        "batch": selected.batch,
        "few_step_batch": selected.few_step_batch,
        "device": str(torch_device),
        "dtype": str(dtype),
        "rounds": rounds,
    }
    if not as_json:
        training.print_costs(costs)
    _write_figures(out, configuration, {"rows": [asdict(cost) for cost in costs]}, torch_device)


@bench.command("speed")
def measure_inference(
    base: Annotated[
        str, typer.Option(help="mini, sdxl or flux; full size, random weights.")
    ] = "sdxl",
    size: Annotated[int, typer.Option(min=64, help="Width and height in pixels.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    guided: Annotated[
        bool,
        typer.Option("--guided", help="SDXL: with guidance, as one batch and in two passes."),
    ] = False,
    depth_scale: Annotated[
        float, typer.Option(min=0.01, max=1, help="FLUX: share of the blocks.")
    ] = 1.0,
    memory: Annotated[str, typer.Option(help="FLUX: full, 24gb, 16gb or 12gb.")] = "full",
    rounds: Rounds = 5,
    out: Output = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure one denoising step: base, PuLID, and PuLID with keys and values recomputed."""
    from openpulid.bench.perf import inference, training

    torch_device = _select_device(device)
    target = inference.speed_target(base, torch_device, size, batch, guided, depth_scale, memory)
    steps = inference.measure(target, rounds, None if as_json else print_progress)
    configuration = {
        "base": base,
        "size": size,
        "batch": batch,
        "guided": guided,
        "depth_scale": depth_scale,
        "memory": memory,
        "device": str(torch_device),
        "dtype": str(training.dtype_of(base, torch_device)),
        "rounds": rounds,
    }
    _write_figures(out, configuration, {"rows": [asdict(step) for step in steps]}, torch_device)


@bench.command("identify")
def measure_face_analysis(
    rounds: Rounds = 5, out: Output = None, device: Device = None, as_json: AsJson = False
) -> None:
    """Measure the extraction of an identity by stage, here and in the reference implementation."""
    from openpulid.bench.perf import face_analysis
    from openpulid.device import compute_dtype

    torch_device = _select_device(device)
    stages = face_analysis.measure(torch_device, rounds, None if as_json else print_progress)
    total = stages[-1]
    ratio = round((total.seconds or 0) / (total.reference or 1), 3)
    configuration = {
        "device": str(torch_device),
        "dtype": str(compute_dtype(torch_device)),
        "rounds": rounds,
    }
    figures = {"ratio": ratio, "rows": [asdict(stage) for stage in stages]}
    _write_figures(out, configuration, figures, torch_device)


def _write_figures(
    out: Path | None,
    configuration: Mapping[str, Any],
    figures: Mapping[str, Any],
    device: torch.device,
) -> None:
    if out is not None:
        from openpulid.bench.measurement import write_measurement

        write_measurement(out, configuration, figures, device)
    print_json({**configuration, **figures})


def _check_libraries() -> None:
    """Check the extra's libraries before the first image is generated."""
    missing = [name for name in ("torchmetrics", "matplotlib") if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"the benchmark needs {' and '.join(missing)}: pip install 'openpulid[bench]'."
        )


def _select_device(name: str | None) -> torch.device:
    import torch

    from openpulid.device import best_device

    return torch.device(name) if name else best_device()


def _load_subjects(suite: Suite, photos: Path | None, count: int | None) -> list[Subject]:
    from openpulid.bench.subjects import load_photo_subjects
    from openpulid.mini.evaluation.subjects import synthetic_subjects

    if photos is not None:
        return load_photo_subjects(photos)[:count]
    if not suite.num_people:
        raise OptionError(
            f"suite {suite.name} has no people of its own; pass a folder of photos with --people."
        )
    return synthetic_subjects(count or suite.num_people, suite.first_person)


def _load_scorers(
    suite: Suite, device: str | None, tell: Callable[[str], None] = print_status
) -> Scorers:
    """Load the miniature's own metric models, or published ones for photos."""
    if suite.uses_miniature:
        from openpulid.mini.evaluation.scorers import MiniScorers

        return MiniScorers.load()
    from openpulid.bench.scorers import PhotoScorers

    return PhotoScorers.load(_select_device(device), tell)
