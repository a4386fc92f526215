"""The `pulid bench` commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openpulid.cli.bench_perf import (
    measure_face_analysis,
    measure_inference,
    measure_training,
    select_device,
)
from openpulid.cli.bench_plan import print_missing_files, print_plan
from openpulid.cli.options import (
    MAX_PEOPLE,
    AsJson,
    Device,
    command_group,
    make_directory,
    print_json,
    print_nothing,
    print_progress,
    print_status,
)
from openpulid.errors import OptionError, WeightsError, require_libraries

if TYPE_CHECKING:
    from openpulid.bench.run_dir import Subject
    from openpulid.bench.score import Scorers
    from openpulid.bench.suite import Suite

bench = command_group("Compare methods, and measure time and memory.")
bench.command("train")(measure_training)
bench.command("speed")(measure_inference)
bench.command("identify")(measure_face_analysis)


@bench.command("run")
def run_suite(
    suite: Annotated[
        str, typer.Argument(help="miniature, quick, pulid-paper, multiid-bench, or a JSON file.")
    ],
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
    scales: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated identity scales, such as 0.3,0.5,1: every method at each of them "
            "as well, for curves and the comparison at equal similarity."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Preset of all methods; the suite's by default.")
    ] = None,
    people: Annotated[
        Path | None, typer.Option(help="Folder of photos, for a suite without its own people.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_PEOPLE, help="Number of people; the suite's by default."),
    ] = None,
    recognition: Annotated[
        str | None,
        typer.Option(help="Photos: face recognition model that scores, curricularface or sface."),
    ] = None,
    workers: Annotated[
        str | None, typer.Option(help="Number of processes, or ray://HOST:PORT for a cluster.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print the published files that are needed, and end."),
    ] = False,
    device: Device = None,
) -> None:
    """Generate all missing images, compute their metrics and write the report."""
    _check_libraries()
    from openpulid.bench.methods import check_weights, parse_scales, select_presets
    from openpulid.bench.ray_backend import check_workers
    from openpulid.bench.run import run_benchmark
    from openpulid.bench.suite import load_suite

    if workers is not None:
        check_workers(workers)
    loaded_suite = load_suite(suite)
    if preset is not None:
        loaded_suite = loaded_suite.with_preset(preset)
    if recognition is not None:
        loaded_suite = loaded_suite.with_recognition(recognition)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    selected_scales = [] if scales is None else parse_scales(scales)
    lacks_people = people is None and not loaded_suite.num_people
    if plan or (preset is not None and lacks_people):
        print_plan(loaded_suite, names)
        if plan:
            return
    presets = select_presets(loaded_suite, names, selected_scales)
    loaded_suite, subjects = _load_subjects(loaded_suite, people, count)
    print_missing_files(loaded_suite, presets)
    check_weights(presets)
    make_directory(out)
    paths = run_benchmark(
        loaded_suite,
        presets,
        subjects,
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


def _check_libraries() -> None:
    """Check the extra's libraries before the first image is generated."""
    require_libraries("the benchmark", ("torchmetrics", "matplotlib"), extra="bench")


def _load_subjects(
    suite: Suite, photos: Path | None, count: int | None
) -> tuple[Suite, list[Subject]]:
    """Load the people, and the prompts that they bring, if the suite has a list of cases."""
    from openpulid.bench.multiid import load_cases
    from openpulid.bench.subjects import load_photo_subjects
    from openpulid.mini.evaluation.subjects import synthetic_subjects

    if photos is not None and suite.case_list:
        return load_cases(suite, photos, count)
    if photos is not None:
        return suite, load_photo_subjects(photos, count)
    if not suite.num_people:
        raise OptionError(
            f"suite {suite.name} has no people for preset {suite.preset}; pass a folder of photos "
            "with --people."
        )
    return suite, synthetic_subjects(count or suite.num_people, suite.first_person)


def _load_scorers(
    suite: Suite, device: str | None, tell: Callable[[str], None] = print_status
) -> Scorers:
    """Load the miniature's own metric models, or published ones for photos."""
    if suite.uses_miniature:
        from openpulid.mini.evaluation.scorers import MiniScorers

        return MiniScorers.load()
    from openpulid.bench.scorers import PhotoScorers

    return PhotoScorers.load(select_device(device), tell, suite.recognition)
