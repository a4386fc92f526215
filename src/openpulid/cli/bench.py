"""The commands `pulid bench`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
    from openpulid.bench.generate import Worker
    from openpulid.bench.run_dir import RunDir, Subject
    from openpulid.bench.score import Scorers
    from openpulid.bench.suite import Suite
    from openpulid.pipelines.presets import Preset

bench = command_group("Compare methods, and measure time and memory.")


@bench.command("run")
def run_suite(
    suite: Annotated[
        str, typer.Argument(help="Suite: miniature, quick, pulid-paper, or a JSON file.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Run directory; existing images are kept."),
    ],
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated; METHOD:FILE is another adapter, METHOD@0.5 a scale."),
    ] = "pulid",
    people: Annotated[
        Path | None,
        typer.Option(help="Directory of photos, for suites without subjects."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Number of subjects; the suite's by default.")
    ] = None,
    workers: Annotated[
        str | None, typer.Option(help="Processes, or ray://HOST:PORT for a cluster.")
    ] = None,
    device: Device = None,
) -> None:
    """Generate missing images, score all, and write the report."""
    _only_with_extra()
    from datetime import datetime, timezone

    from openpulid.bench import generate as running
    from openpulid.bench import report
    from openpulid.bench import score as judging
    from openpulid.bench.ray_backend import ray_executor
    from openpulid.bench.run_dir import RunDir
    from openpulid.bench.suite import find_suite

    asked, folder = find_suite(suite), RunDir(out.resolve() if workers else out)
    named = _presets(asked, [name.strip() for name in methods.split(",") if name.strip()])
    _only_complete(named)
    sitters, judges = _sitters(asked, people, count), _judges(asked.preset, device)
    start = datetime.now(timezone.utc).isoformat()

    def contest() -> Worker:
        return _contest(asked, named, sitters, folder, device, start)

    spread = ray_executor(contest, workers) if workers else running.here(contest())
    running.run(asked, named, sitters, folder, spread, print_progress)
    judging.score_run(folder, judges)
    for file in report.write(folder):
        print_status(str(file))


@bench.command("report")
def report_run(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    as_json: AsJson = False,
) -> None:
    """Write the table of a run as Markdown, JSON and HTML; missing scores are computed."""
    _only_with_extra()
    from openpulid.bench import report, table
    from openpulid.bench import score as judging
    from openpulid.bench.run_dir import RunDir

    folder, tell = RunDir(run), print_nothing if as_json else print_status
    preset = folder.facts()["suite"]["preset"]
    try:
        judges = _judges(preset, None, tell)
    except WeightsError as error:
        tell(f"nothing more is measured: {error}")
    else:
        judging.score_run(folder, judges)
    if not as_json:
        for file in report.write(folder):
            print_status(str(file))
    print_json(table.as_json(folder))


def _only_with_extra() -> None:
    """Found out before the first image, and not by the report after the last."""
    from importlib.util import find_spec

    if lacking := [name for name in ("torchmetrics", "matplotlib") if find_spec(name) is None]:
        raise OptionError(
            f"the benchmark needs {' and '.join(lacking)}: pip install 'openpulid[bench]'."
        )


def _only_complete(presets: Mapping[str, Preset]) -> None:
    """Found out before anything is loaded, here or by a worker, and before anything is written."""
    from openpulid.io.hub import WEIGHTS
    from openpulid.pipelines.weights import missing_weights

    lacking = {name: preset for preset in presets.values() for name in missing_weights(preset)}
    if published := " ".join(name for name in lacking if name in WEIGHTS):
        raise WeightsError(
            f"weights of these methods are missing; `pulid weights get {published}` downloads "
            "them, or set PULID_WEIGHTS to a directory that has them."
        )
    if lacking:
        name, preset = next(iter(lacking.items()))
        rival = (
            f" --method {preset.models.method}"
            if name == str(preset.models.adapter) and preset.models.method != "pulid"
            else ""
        )
        raise WeightsError(f"{name} is not there; `pulid mini build{rival}` makes it.")


def _sitters(suite: Suite, photos: Path | None, count: int | None) -> list[Subject]:
    from openpulid.bench import subjects as people
    from openpulid.mini.evaluation.subjects import synthetic_subjects

    if photos is not None:
        return people.photo_subjects(photos)[:count]
    if not suite.people:
        raise OptionError(
            f"the suite {suite.name} has no subjects: pass a directory of photos with --people."
        )
    return synthetic_subjects(count or suite.people, suite.first)


def _judges(preset: str, device: str | None, tell: Callable[[str], None] = print_status) -> Scorers:
    """The miniature's own for its presets, published networks for photographs."""
    if preset.startswith("mini"):
        from openpulid.mini.evaluation.scorers import MiniScorers as Miniature

        return Miniature.load()
    import torch

    from openpulid.bench.scorers import PhotoScorers
    from openpulid.device import best_device

    return PhotoScorers.load(torch.device(device) if device else best_device(), tell)


def _entry(named: str) -> tuple[str, Path | None, float | None]:
    """METHOD[:FILE][@SCALE] in its parts."""
    parts = re.fullmatch(r"([^:@]+)(?::(.+?))?(?:@(\d*\.?\d+))?", named)
    if parts is None:
        raise OptionError(
            f"expected METHOD, METHOD:FILE, METHOD@SCALE or METHOD:FILE@SCALE, got {named!r}."
        )
    method, file, scale = parts.groups()
    return method, Path(file) if file else None, float(scale) if scale else None


def _label(named: str) -> str:
    """Return the name of a method in a run: its own or its file's, with a given scale."""
    method, file, scale = _entry(named)
    return (file.stem if file else method) + (f"@{scale:g}" if scale is not None else "")


def _presets(suite: Suite, names: Sequence[str]) -> dict[str, Preset]:
    """What each row of the table is called, and what it is made with; the base first."""
    from openpulid.bench.run_dir import BASE
    from openpulid.pipelines.presets import find_preset, with_method

    presets = {BASE: find_preset(suite.preset)}
    for name in names:
        method, file, scale = _entry(name)
        if method == BASE:
            continue
        if (label := _label(name)) in presets:
            raise OptionError(
                f"two methods are named {label}; rename one file, or pass each method once."
            )
        presets[label] = with_method(presets[BASE], method, file)
        if scale is not None:
            presets[label] = presets[label].with_defaults(scale=scale)
    for _, file, _ in map(_entry, names):
        if file is not None and not file.exists():
            raise OptionError(f"{file} is not there; after METHOD: stands a file of that method.")
    return presets


def _contest(
    suite: Suite,
    presets: Mapping[str, Preset],
    sitters: list[Subject],
    folder: RunDir,
    device: str | None,
    start: str | None = None,
) -> Worker:
    from openpulid.bench.generate import Worker
    from openpulid.bench.run_dir import BASE
    from openpulid.pipelines.factory import load_adapter, load_extractor
    from openpulid.pipelines.studio import Studio, load

    studio = load(suite.preset, device=device)
    studios = {BASE: studio}  # its adapter is not used without an identity
    for label, preset in presets.items():
        if label != BASE:
            adapter = load_adapter(preset, studio.pipe.device)
            extractor = studio.extractor
            if preset.models.extractor == "clip":
                extractor = load_extractor(preset, studio.pipe.device, adapter)
            studios[label] = Studio(studio.pipe, adapter, extractor, preset)
    return Worker(suite, studios, {sitter.name: sitter for sitter in sitters}, folder, start)


@bench.command("train")
def bench_train(
    base: Annotated[str, typer.Option(help="mini or sdxl.")] = "mini",
    random: Annotated[
        bool,
        typer.Option(
            "--random", help="Random weights; the cost of a step does not depend on them."
        ),
    ] = False,
    recipe: Annotated[str | None, typer.Option(help="Recipe; BASE_stage3 by default.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images of the diffusion branch; the recipe's by default."),
    ] = None,
    fast_batch: Annotated[
        int | None, typer.Option(min=1, help="Images of the lightning branch.")
    ] = None,
    pixels: Annotated[int | None, typer.Option(help="Image size of the lightning branch.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps per candidate, interleaved.")] = 5,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a training step with gradients through the last 1 to 4 steps."""
    from dataclasses import asdict, replace

    import torch

    from openpulid.bench.perf import training

    _only_random(random)
    from openpulid.device import best_device
    from openpulid.training.pulid.recipes import find_recipe

    chosen = torch.device(device) if device else best_device()
    known = find_recipe(recipe or f"{base}_stage3")
    sizes: dict[str, Any] = {"batch": batch, "fast_batch": fast_batch, "pixels": pixels}
    known = replace(known, **{name: value for name, value in sizes.items() if value})
    dtype = training.dtype_of(base, chosen)
    task = training.random_task(known, training.random_base(base, chosen, dtype))
    costs = training.measure(task, rounds=rounds, on_progress=None if as_json else print_progress)
    facts = {
        "base": base,
        "recipe": known.name,
        "batch": known.batch,
        "fast_batch": known.fast_batch,
        "device": str(chosen),
    }
    facts["dtype"] = str(dtype)
    if not as_json:
        training.show(costs)
    print_json({**facts, "rows": [asdict(cost) for cost in costs]})


@bench.command()
def speed(
    base: Annotated[str, typer.Option(help="mini, sdxl or flux.")] = "sdxl",
    random: Annotated[
        bool,
        typer.Option(
            "--random", help="Random weights; the cost of a step does not depend on them."
        ),
    ] = False,
    size: Annotated[int, typer.Option(min=64, help="Width and height in pixels.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    guided: Annotated[
        bool, typer.Option("--guided", help="SDXL: with guidance, as one batch and as two.")
    ] = False,
    depth_scale: Annotated[
        float, typer.Option(min=0.01, max=1, help="FLUX: fraction of its blocks.")
    ] = 1.0,
    memory: Annotated[str, typer.Option(help="FLUX: full, 24gb, 16gb or 12gb.")] = "full",
    rounds: Annotated[int, typer.Option(min=1, help="Calls per candidate, interleaved.")] = 5,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a sampling step of the base model, and with PuLID."""
    from dataclasses import asdict

    import torch

    from openpulid.bench.perf import inference as bench_speed
    from openpulid.bench.perf.training import dtype_of
    from openpulid.device import best_device

    _only_random(random)
    chosen = torch.device(device) if device else best_device()
    it = bench_speed.speed_target(base, chosen, size, batch, guided, depth_scale, memory)
    steps = bench_speed.measure(it, rounds, None if as_json else print_progress)
    facts = {
        "base": base,
        "size": size,
        "batch": batch,
        "guided": guided,
        "depth_scale": depth_scale,
        "level": memory,
    }
    facts["dtype"] = str(dtype_of(base, chosen))
    print_json(
        {**facts, "rounds": rounds, "device": str(chosen), "rows": [asdict(step) for step in steps]}
    )


@bench.command("identify")
def bench_identify(
    random: Annotated[
        bool, typer.Option("--random", help="Random weights; the cost does not depend on them.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Calls per stage, interleaved.")] = 5,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure each stage of identity extraction, and of the reference implementation."""
    from dataclasses import asdict

    import torch

    from openpulid.bench.perf import face_analysis as identify
    from openpulid.device import best_device, compute_dtype

    _only_random(random)
    chosen = torch.device(device) if device else best_device()
    stages = identify.measure(
        chosen, rounds=rounds, on_progress=None if as_json else print_progress
    )
    ratio = round((stages[-1].here or 0) / (stages[-1].reference or 1), 3)
    facts = {"device": str(chosen), "dtype": str(compute_dtype(chosen)), "rounds": rounds}
    print_json({**facts, "ratio": ratio, "rows": [asdict(stage) for stage in stages]})


def _only_random(random: bool) -> None:
    if not random:
        raise OptionError("this benchmark only supports random weights; pass --random.")
